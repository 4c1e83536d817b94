"""SIGTERM, which schedulers send before they take a machine away: write a checkpoint and end the run.

Lightning's own handler broadcasts inside the signal handler, between any two messages of its process, and saves
nothing. Here the handler only sets a flag; all processes compare flags once per optimizer step, and save together.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from sft_lightning.compat.lightning.loops import is_accumulating

EXIT_STATUS = 128 + int(signal.SIGTERM)
"""Exit status of a process that SIGTERM has ended, as shells count it: 143."""


class Preemption(Callback):
    """On SIGTERM to any process: finish the optimizer step, write `checkpoints/last.ckpt`, exit with status 143.

    `--ckpt_path last` continues the run. The grace period must be longer than an optimizer step (or a validation, which
    is not interrupted) and the writing of a checkpoint together.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._leaving = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handler; Lightning restores the former one when the run ends."""
        self._signalled = self._leaving = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._set_flag)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint at the end of an optimizer step if any process has been signalled."""
        if is_accumulating(trainer):
            return
        if not trainer.strategy.reduce_boolean_decision(self._signalled, all=False):
            return
        path = last_checkpoint(trainer)
        trainer.save_checkpoint(path)
        trainer.strategy.barrier()
        rank_zero_info(
            f"SIGTERM: saved {path} after optimizer step {trainer.global_step}; continue with --ckpt_path last"
        )
        self._leaving = True  # at the next hook: this step is logged after the callbacks

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Exit, if a checkpoint has been saved."""
        self._leave(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exit, if a checkpoint has been saved."""
        self._leave(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exit, if a checkpoint has been saved."""
        self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        if self._leaving:
            raise SystemExit(EXIT_STATUS if _is_started_by_scheduler(trainer) else 0)

    def _set_flag(self, signum: int, frame: Any) -> None:
        self._signalled = True


def last_checkpoint(trainer: Trainer) -> Path:
    """Return the file that `--ckpt_path last` continues from."""
    callback = trainer.checkpoint_callback
    folder = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
    return (
        Path(folder or Path(trainer.default_root_dir) / "checkpoints") / f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}.ckpt"
    )


def _is_started_by_scheduler(trainer: Trainer) -> bool:
    """Whether a scheduler, not Lightning, started this process; Lightning takes another status than 0 for a crash."""
    return bool(getattr(trainer.strategy, "launcher", None) is None or int(os.environ.get("LOCAL_RANK", "0")) == 0)
