"""SIGTERM, as schedulers send it before they take a machine away: a checkpoint, and the end of the run.

Lightning's own handler broadcasts inside the handler, whatever its process was about to send, and saves nothing. Here a
handler only takes note; all processes agree once per optimizer step, and save together.
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
"""What a process ends with that SIGTERM has ended, as shells count it: 143."""


class Preemption(Callback):
    """On SIGTERM to any process: finish the optimizer step, write `checkpoints/last.ckpt`, exit with status 143.

    `--ckpt_path last` continues the run. The step under way is finished first, so the grace period has to be longer
    than a step (and than a validation, which is not interrupted) and the writing of a checkpoint.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._leaving = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signal over; Lightning gives it back when the run ends."""
        self._signalled = self._leaving = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if a process has been told to leave."""
        if is_accumulating(trainer):
            return
        if not trainer.strategy.reduce_boolean_decision(self._signalled, all=False):
            return
        path = last_checkpoint(trainer)
        trainer.save_checkpoint(path)
        trainer.strategy.barrier()
        rank_zero_info(
            f"SIGTERM: {path} holds the run after optimizer step {trainer.global_step}; continue with --ckpt_path last"
        )
        self._leaving = True  # once this step is logged, which comes after callbacks

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._leave(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        if self._leaving:
            raise SystemExit(EXIT_STATUS if _is_seen_from_outside(trainer) else 0)

    def _note(self, signum: int, frame: Any) -> None:
        self._signalled = True


def last_checkpoint(trainer: Trainer) -> Path:
    """Return where `--ckpt_path last` looks."""
    callback = trainer.checkpoint_callback
    folder = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
    return (
        Path(folder or Path(trainer.default_root_dir) / "checkpoints") / f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}.ckpt"
    )


def _is_seen_from_outside(trainer: Trainer) -> bool:
    """Whether a scheduler started this process; one that Lightning started would be taken for a crash."""
    return bool(getattr(trainer.strategy, "launcher", None) is None or int(os.environ.get("LOCAL_RANK", "0")) == 0)
