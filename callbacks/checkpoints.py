"""When checkpoints are saved: at the end of each epoch, every 30 minutes, and after the last optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from sft_lightning.compat.lightning.loops import is_accumulating
from sft_lightning.compat.lightning.schedules import note_continued_step, save_now, save_when_training


class TimedCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint` with a time interval: overwrites `checkpoints/last.ckpt`, and keeps no other file.

    The clock is read when an optimizer step has ended. Several processes agree on it by a message between their GPUs,
    so they read it only where the run logs, and waits for the GPUs anyway.

    Args:
        train_time_interval: Time between two checkpoints, such as `"02:00:00"`.
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
        """Save if the interval is over and an optimizer step has ended."""
        every = max(1, getattr(trainer, "log_every_n_steps", 1)) if trainer.world_size > 1 else 1
        if not is_accumulating(trainer) and trainer.global_step % every == 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class LastCheckpoint(Callback):
    """Save after the last optimizer step, whatever the intervals of the other checkpoint callbacks are.

    Each of them saves as it does at its own steps, so that `save_top_k` counts the file too. One that monitors a metric
    writes `last.ckpt` only.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let each callback without a metric save at the steps that it names."""
        for callback in _savers(trainer.checkpoint_callbacks):
            if not _monitors_metric(callback):
                save_when_training(callback)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save no second checkpoint of the step that the run continues from."""
        for callback in _savers(trainer.checkpoint_callbacks):
            note_continued_step(callback, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, before anything is exported: a killed export is repeated from this checkpoint."""
        for callback in _savers(trainer.checkpoint_callbacks):
            if not isinstance(callback, TimedCheckpoint):
                save_now(callback, trainer, only_last=_monitors_metric(callback))


def _savers(given: Sequence[Callback]) -> list[ModelCheckpoint]:
    return [callback for callback in given if isinstance(callback, ModelCheckpoint)]


def _monitors_metric(callback: ModelCheckpoint) -> bool:
    return callback.monitor not in (None, "step", "epoch")


def set_folders(given: Sequence[Callback], folder: Path) -> list[Path]:
    """Save in one folder whatever the loggers are; Lightning takes the folder of the first logger.

    Args:
        given: The callbacks; those that save get the folder, unless the user has set `dirpath`.
        folder: `checkpoints/` in `trainer.default_root_dir`.

    Returns:
        Every folder that the callbacks save in, `folder` first.
    """
    savers = _savers(given)
    for callback in savers:
        callback.dirpath = callback.dirpath or str(folder)
    return list(dict.fromkeys([folder, *(Path(str(callback.dirpath)) for callback in savers)]))


def default_checkpoints(given: Sequence[Callback]) -> list[Callback]:
    """Return callbacks that save at the end of each epoch and, in long epochs, every 30 minutes.

    The user's own `ModelCheckpoint` replaces both; the user's `TimedCheckpoint` replaces only the timed one.
    """
    own = _savers(given)
    if not all(isinstance(callback, TimedCheckpoint) for callback in own):
        return []
    timed = [] if own else [TimedCheckpoint()]
    # Both write `last.ckpt`: with a version counter the second would write `last-v1.ckpt`.
    return [ModelCheckpoint(filename="{step}", save_last=True, enable_version_counter=False), *timed]
