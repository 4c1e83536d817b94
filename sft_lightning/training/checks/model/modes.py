"""Everything trains in training mode, and is validated in evaluation mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft_lightning.checks import Check
from sft_lightning.training.checks.hooks import RunCheck

if TYPE_CHECKING:
    from torch import nn

    from sft_lightning.training.module import CausalLMModule


class TrainingMode(RunCheck):
    """Check the mode of every part of the model, when training starts and while validating."""

    def on_train_start(self, module: CausalLMModule) -> None:
        """Check that every part trains: one in evaluation mode has no dropout."""
        module.checks.run(lambda: check_mode(module.language_model, training=True))

    def on_validation_start(self, module: CausalLMModule) -> None:
        """Check that no part is in training mode, where dropout would change the losses."""
        module.checks.run(lambda: check_mode(module.language_model, training=False))


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
