"""A validation's means weigh every supervised token, or every pair, as its batches do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from sft_lightning.checks import Check
from sft_lightning.training.checks.hooks import RunCheck

if TYPE_CHECKING:
    from sft_lightning.training.module import CausalLMModule


class ValidationWeight(RunCheck):
    """Compare what a validation's means were divided by with the weights in its batches, on every process."""

    def __init__(self) -> None:
        self._weight: torch.Tensor | None = None

    def on_validation_start(self, module: CausalLMModule) -> None:
        """Begin with nothing."""
        self._weight = None

    def on_validation_batch_end(self, module: CausalLMModule, batch: Any, index: int, source: int) -> None:
        """Add the weights of a batch, without waiting for the device."""
        weights = batch["pair_weights"] if "pair_weights" in batch else batch["loss_weights"]
        weight = weights.sum(dtype=torch.float64)
        self._weight = weight if self._weight is None else self._weight + weight

    def on_validation_end(self, module: CausalLMModule) -> None:
        """Compare."""
        found, expected = float(module.means.weight), 0.0 if self._weight is None else float(self._weight)
        module.checks.run(lambda: check_weight(found, expected))


def check_weight(found: float, expected: float) -> Check:
    """Check that the means of a validation were divided by the weights of all its batches.

    Args:
        found: What the sums were divided by: means over tokens have their weight, means of means have other numbers.
        expected: Σ loss weight of the batches, or Σ weight of their pairs.
    """
    figure = f"means over a weight of {found:g}, Σ weight of the batches is {expected:g}"
    return Check("validation weight", math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-6), figure)
