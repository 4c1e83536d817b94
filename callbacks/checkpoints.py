"""When checkpoints are saved: at the end of each epoch, and every 30 minutes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from sft_lightning.compat.lightning.loops import is_accumulating


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


def set_folders(given: Sequence[Callback], folder: Path) -> list[Path]:
    """Save in one folder whatever the loggers are; Lightning takes the folder of the first logger.

    Args:
        given: The callbacks; those that save get the folder, unless the user has set `dirpath`.
        folder: `checkpoints/` in `trainer.default_root_dir`.

    Returns:
        Every folder that the callbacks save in, `folder` first.
    """
    savers = [callback for callback in given if isinstance(callback, ModelCheckpoint)]
    for callback in savers:
        callback.dirpath = callback.dirpath or str(folder)
    return list(dict.fromkeys([folder, *(Path(str(callback.dirpath)) for callback in savers)]))


def default_checkpoints(given: Sequence[Callback]) -> list[Callback]:
    """Return callbacks that save at the end of each epoch and, in long epochs, every 30 minutes.

    The user's own `ModelCheckpoint` replaces both; the user's `TimedCheckpoint` replaces only the timed one.
    """
    own = [callback for callback in given if isinstance(callback, ModelCheckpoint)]
    if not all(isinstance(callback, TimedCheckpoint) for callback in own):
        return []
    timed = [] if own else [TimedCheckpoint()]
    # Both write `last.ckpt`: with a version counter the second would write `last-v1.ckpt`.
    return [ModelCheckpoint(filename="{step}", save_last=True, enable_version_counter=False), *timed]
