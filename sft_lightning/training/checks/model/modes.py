"""Everything trains in training mode, and is validated in evaluation mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sft_lightning.checks import Check
from sft_lightning.training.checks.hooks import RunCheck

if TYPE_CHECKING:
    from torch import nn

    from sft_lightning.training.module import CausalLMModule


_REORDERED = 1e-3
"""Largest relative difference of two losses whose sums were taken in another order."""


class Modes(RunCheck):
    """Check the mode of every part of the model, when training starts and while validating."""

    def __init__(self) -> None:
        self._repeated = False

    def on_train_start(self, module: CausalLMModule) -> None:
        """Check that every part trains: one in evaluation mode has no dropout."""
        module.checks.run(lambda: check_mode(module.language_model, training=True))

    def on_validation_batch_end(self, module: CausalLMModule, batch: Any, index: int, source: int) -> None:
        """Check that no part is in training mode, where dropout changes losses; repeat the first loss."""
        if index == 0:  # after the batch: whatever was to happen before it has happened
            module.checks.run(lambda: check_mode(module.language_model, training=False))
        if not self._repeated and not module.trainer.sanity_checking:  # a new adapter has the same loss with dropout
            self._repeated = True
            module.checks.run(lambda: check_repetition(module, batch))


def check_mode(model: nn.Module, *, training: bool) -> Check:
    """Check that every part of a model is in the same mode.

    Args:
        model: The model, adapters included.
        training: Whether that mode is the training mode; evaluation mode otherwise.

    Returns:
        A check that names the first part in the other mode.
    """
    names = ("training", "evaluation") if training else ("evaluation", "training")
    wrong = [name or "the model itself" for name, part in model.named_modules() if part.training is not training]
    figure = f"{len(wrong)} parts in {names[1]} mode{f': {wrong[0]} …' if wrong else ''}"
    return Check(f"{names[0]} mode", not wrong, figure)


@torch.no_grad()
def check_repetition(module: CausalLMModule, batch: Any) -> Check:
    """Check that the same batch has the same loss twice: nothing in the model is random.

    On the CPU to the last bit. The kernels of other devices may add in another order each time, as those of mixtures of
    experts do; dropout changes a loss far more than that.

    Args:
        module: The module of the run, while validating.
        batch: A micro-batch of the validation, on its device.
    """
    with module.trainer.precision_plugin.val_step_context():
        first, second = (torch.stack(list(module(batch))).nan_to_num() for _ in range(2))
    return compare_repetition(first, second, exact=first.device.type == "cpu")


def compare_repetition(first: torch.Tensor, second: torch.Tensor, *, exact: bool) -> Check:
    """Compare the loss sums of a batch that was computed twice.

    Args:
        first: Loss and weight, and whatever else was summed, (3,).
        second: The same, computed again.
        exact: Whether every bit has to be the same.
    """
    figure = f"losses {float(first[0]):.6f} and {float(second[0]):.6f} of the same batch"
    if exact:
        return Check("validation twice", torch.equal(first, second), figure)
    apart = float((first[0] - second[0]).abs())
    bound = _REORDERED * float(first[0].abs() + first[1])
    return Check("validation twice", apart <= bound, figure, f"relative difference at most {_REORDERED:.1e}")
