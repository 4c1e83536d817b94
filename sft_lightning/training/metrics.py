"""Validation metrics: token-weighted over all rows and ranks, never a mean of means."""

from __future__ import annotations

import torch
from torchmetrics import Metric

from sft_lightning.training.losses import LossSums


class TokenMeans(Metric):
    """Loss, perplexity and accuracy per supervised token; only three scalars are kept, never logits."""

    full_state_update = False

    loss: torch.Tensor
    weight: torch.Tensor
    correct: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in LossSums._fields:
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: LossSums) -> None:
        """Add a micro-batch."""
        self.loss += sums.loss.detach()
        self.weight += sums.weight
        self.correct += sums.correct

    def compute(self) -> dict[str, torch.Tensor]:
        """Return `loss` in nats per token, `perplexity` (inf where it overflows) and `token_accuracy`."""
        loss = self.loss / self.weight
        return {"loss": loss, "perplexity": loss.exp(), "token_accuracy": self.correct / self.weight}
