"""Where curves begin: the validation before training, and the first optimizer step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sft_lightning.compat.lightning.loops import validate_before_training
from sft_lightning.errors import UserError
from sft_lightning.training.checkpoint import random_state, set_random_state
from sft_lightning.training.startup import datamodule_of


class EvaluateFirst(Callback):
    """Runs the validation once before the first optimizer step: `val/*` at step 0.

    Not among the default callbacks: name it in `trainer.callbacks`. The run's random state is left as it is, so the
    same bits are learned with it and without. A continued run has its step 0 behind it, and evaluates no second time.
    An `EarlyStopping` counts the evaluation like any other.

    Raises:
        UserError: If there is nothing to validate on.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not datamodule_of(trainer).source_names("val"):
            raise UserError(
                "callbacks.EvaluateFirst: there is nothing to validate on; set data.val_sources or data.val_fraction"
            )
        if not trainer.limit_val_batches:
            raise UserError(
                "callbacks.EvaluateFirst: trainer.limit_val_batches is 0, which switches validation off; remove one of "
                "the two"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step:
            return
        state = random_state()
        validate_before_training(trainer)
        set_random_state(state)


class FirstStep(Callback):
    """Has the first optimizer step logged, whatever `trainer.log_every_n_steps` says of the others.

    Lightning counts from the interval's end: with 10 it logs steps 9, 19, … and nothing before them. An interval of 0
    logs nothing, and stays so.
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
    trainer.log_every_n_steps = steps  # type: ignore[attr-defined]  # Lightning sets it out of mypy's sight
