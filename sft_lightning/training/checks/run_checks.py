"""When the checks of a run are made. Each hook calls a function beside it, and notes its outcome in `module.checks`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer

from sft_lightning.checks import Check

if TYPE_CHECKING:
    from sft_lightning.training.module import CausalLMModule


class RunChecks(Callback):
    """Make the checks of a training run. The module brings it with it, so that no configuration is without it."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Check how the model trains, after everything else is set up and before the first micro-batch."""
        module: CausalLMModule = pl_module
        module.checks.run(lambda: _training_mode(module))


def _training_mode(module: CausalLMModule) -> Check:
    evaluating = [name for name, part in module.language_model.named_modules() if not part.training]
    figure = f"{len(evaluating)} parts in evaluation mode{f': {evaluating[0]} …' if evaluating else ''}"
    return Check("training mode", not evaluating, figure)
