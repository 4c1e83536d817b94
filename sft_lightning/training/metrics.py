"""Validation metrics: token-weighted over all rows and ranks, never a mean of means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


class SourceMeans:
    """The means of a stage: of each of its sources, and of all together.

    Args:
        names: The sources.
        make: Makes the metric of one source.
        of_each: Which of the means are of interest source by source; `None` for all.
    """

    def __init__(self, names: Sequence[str], make: Callable[[], Metric], of_each: Sequence[str] | None = None) -> None:
        self._of_each = of_each
        self._means = {name: make() for name in names}
        self._total = make()

    def update(self, source: int, *sums: Any) -> None:
        """Add a micro-batch of a source, counted from 0: what its metric's `update` takes."""
        for means in (list(self._means.values())[source], self._total):
            means.update(*sums)

    def compute(self) -> dict[str, torch.Tensor]:
        """Return each source's means as `mean/source`, then the means of all; float32 scalars."""
        found: dict[str, torch.Tensor] = {}
        for name, means in self._means.items():
            of_source = means.compute()
            found |= {f"{key}/{name}": of_source[key] for key in self._of_each or of_source}
        return {key: value.float() for key, value in (found | self._total.compute()).items()}
