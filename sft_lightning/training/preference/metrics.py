"""What is logged of preference training: means over pairs, however they are split over micro-batches and ranks."""

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
"""What each mean is of: implicit rewards, the share of pairs with the higher reward for the chosen answer (equal ones
are not), and log-probabilities of whole answers, in nats."""


def pair_sums(scores: PairScores, policy: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted sums over pairs of what `NAMES` says, detached, (7,).

    Args:
        scores: Loss and rewards of the pairs.
        policy: Log-probabilities of the chosen and the rejected answers, (P, 2).
        weights: What each pair weighs, (P,).
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
    """Means over the pairs of a source; only a few scalars are kept."""

    full_state_update = False

    sums: torch.Tensor
    weight: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", default=torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: torch.Tensor, weight: torch.Tensor) -> None:
        """Add a micro-batch: what `pair_sums` returns, and the weight of its pairs."""
        self.sums += sums
        self.weight += weight

    def compute(self) -> dict[str, torch.Tensor]:
        """Return the mean of each of `NAMES`."""
        return dict(zip(NAMES, (self.sums / self.weight).unbind(), strict=True))
