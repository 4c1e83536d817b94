"""A checkpoint every so many minutes, so that a run of one long epoch can be killed and loses little."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class TimedCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint` by the clock: writes `checkpoints/last.ckpt` over, and keeps nothing else.

    The clock is looked at once per optimizer step, where several processes agree on it, not at every micro-batch.

    Args:
        train_time_interval: How long after the last one; `"02:00:00"` for two hours.
    """

    def __init__(self, train_time_interval: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(
            filename=ModelCheckpoint.CHECKPOINT_NAME_LAST,
            train_time_interval=train_time_interval,
            enable_version_counter=False,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if it is time to and an optimizer step has ended."""
        if not trainer.fit_loop._should_accumulate():
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
