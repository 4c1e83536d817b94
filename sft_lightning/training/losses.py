"""Token-weighted cross entropy over supervised tokens; the only place that shifts labels.

A token's loss is predicted at the position before it. Logits are asked of the model at those positions alone, so masked
positions cost nothing in the head, and everything after the decoder runs in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from sft_lightning.types import IGNORE_INDEX


class LossSums(NamedTuple):
    """Sums over a micro-batch's supervised tokens, float32 scalars."""

    loss: torch.Tensor
    """Σ weight · cross entropy, in nats."""

    weight: torch.Tensor
    """Σ weight."""

    correct: torch.Tensor
    """Σ weight over the tokens that the model ranks first."""


def predicting_columns(labels: torch.Tensor) -> torch.Tensor:
    """Return the columns at which some row predicts a supervised token, (C,) int64; for `logits_to_keep`.

    Args:
        labels: Aligned labels, (B, S).
    """
    return (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero().squeeze(1)


def weighted_cross_entropy(
    logits: torch.Tensor, columns: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor
) -> LossSums:
    """Sum the weighted cross entropy of the supervised tokens.

    Args:
        logits: Logits at `columns`, (B, C, V).
        columns: From `predicting_columns`, (C,).
        labels: Aligned labels, (B, S).
        loss_weights: Aligned weights, (B, S).
    """
    targets = labels[:, columns + 1].flatten()
    weights = loss_weights[:, columns + 1].flatten().float()
    supervised = targets != IGNORE_INDEX
    scores = logits.flatten(0, 1)[supervised].float()
    targets, weights = targets[supervised], weights[supervised]
    losses = F.cross_entropy(scores, targets, reduction="none")
    # With nothing supervised, `losses` is empty and its sum still carries a graph: every rank has a backward.
    hits = (scores.detach().argmax(-1) == targets) if len(targets) else weights
    return LossSums((losses * weights).sum(), weights.sum(), (hits * weights).sum())
