"""The first points of all curves: a validation before training, and the first optimizer step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sft_lightning.compat.lightning.loops import validate_before_training
from sft_lightning.errors import UserError
from sft_lightning.training.checkpoint.state import random_state, set_random_state
from sft_lightning.training.startup import datamodule_of


class EvaluateFirst(Callback):
    """Validate once before the first optimizer step, and log `val/*` at step 0.

    Not a default callback: add it to `trainer.callbacks`. It restores the random state, so that training is the same to
    the bit with and without it. A continued run does not validate again. `EarlyStopping` counts this validation.

    Raises:
        UserError: If there is no validation data, or validation is turned off.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not datamodule_of(trainer).source_names("val"):
            raise UserError(
                "callbacks.EvaluateFirst: requires validation data; set data.val_sources or data.val_fraction"
            )
        if not trainer.limit_val_batches:
            raise UserError(
                "callbacks.EvaluateFirst: cannot be combined with trainer.limit_val_batches: 0, which turns validation "
                "off; remove one of the two"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step:
            return
        state = random_state()
        validate_before_training(trainer)
        set_random_state(state)


class FirstStep(Callback):
    """Log the first optimizer step, whatever `trainer.log_every_n_steps` is.

    Lightning logs at the end of each interval: steps 9, 19, … with an interval of 10. With an interval of 0 nothing is
    logged.
    """

    def __init__(self) -> None:
        self._interval: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0 and _interval(trainer):
            self._interval = _interval(trainer)
            _set_interval(trainer, 1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step:
            self._restore(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore(trainer)

    def _restore(self, trainer: Trainer) -> None:
        if self._interval is not None:
            _set_interval(trainer, self._interval)
            self._interval = None


def _interval(trainer: Trainer) -> int:
    return int(getattr(trainer, "log_every_n_steps", 0))


def _set_interval(trainer: Trainer, steps: int) -> None:
    trainer.log_every_n_steps = steps  # type: ignore[attr-defined]  # Lightning sets it where mypy does not see it
