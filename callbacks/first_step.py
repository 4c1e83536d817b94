"""The first point of the training curves."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


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
