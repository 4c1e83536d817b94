"""Metrics of preference training: means over pairs, independent of how they are split over micro-batches and ranks."""

from __future__ import annotations

import torch
from torchmetrics import Metric

from sft_lightning.training.preference.losses import PairScores

NAMES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margin",
    "rewards/accuracy",
    "log_probs/chosen",
    "log_probs/rejected",
)
"""Names of the means: loss, implicit rewards, share of pairs whose chosen answer has the higher reward (equal rewards
do not count), and log-probabilities of whole answers in nats."""


def pair_sums(scores: PairScores, policy: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted sums over pairs of the values in `NAMES`, detached, (7,).

    Args:
        scores: Loss and rewards of the pairs.
        policy: Log-probabilities of the chosen and the rejected answers, (P, 2).
        weights: Weight of each pair, (P,).
    """
    chosen, rejected = scores.chosen_rewards, scores.rejected_rewards
    values = [
        scores.losses.detach(),
        chosen,
        rejected,
        chosen - rejected,
        (chosen > rejected).to(chosen.dtype),
        *policy.detach().unbind(1),
    ]
    return (torch.stack(values) * weights).sum(dim=1)


class PairMeans(Metric):
    """Means over the pairs of a source; keeps a sum for each, never logits."""

    full_state_update = False

    sums: torch.Tensor
    weight: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", default=torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: torch.Tensor, weight: torch.Tensor) -> None:
        """Add a micro-batch.

        Args:
            sums: From `pair_sums`, (7,).
            weight: Sum of the pairs' weights, a scalar.
        """
        self.sums += sums
        self.weight += weight

    def compute(self) -> dict[str, torch.Tensor]:
        """Return the mean of each of `NAMES`."""
        return dict(zip(NAMES, (self.sums / self.weight).unbind(), strict=True))
