"""SIGTERM, which schedulers send before they take a machine away: write a checkpoint and end the run.

Lightning's own handler broadcasts inside the signal handler, between any two messages of its process, and saves
nothing; and before every micro-batch it asks all GPUs for a signal, and waits for them. Here the handler only sets a
flag. All processes compare flags about once a second, through CPU memory, so that no GPU is waited for, and save
together.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from sft_lightning.compat.lightning.loops import is_accumulating, stop_asking_for_signals

EXIT_STATUS = 128 + int(signal.SIGTERM)
"""Exit status of a process that SIGTERM has ended, as shells count it: 143."""


class SignalVote:
    """Tells all processes at the same optimizer step whether one of them was signalled.

    They compare about once a second, and at least once in a logging interval. The steps at which they do are agreed on:
    with their flags, they exchange how long a step takes. Processes that cannot reach each other by gloo, through CPU
    memory, compare by their devices, once in a logging interval.

    Args:
        num_processes: Processes of the run. One alone compares with nobody.
        max_steps: Optimizer steps between two comparisons at most.
        device: The device of this process.
    """

    def __init__(self, num_processes: int, max_steps: int, device: torch.device) -> None:
        self._max_steps = max(1, max_steps)
        self._next: int | None = None  # step of the next comparison; `None`: the first step that ends
        self._last = (0, 0.0)  # step and time of the last one
        self._group: Any = None
        self._alone = num_processes == 1
        self._device = torch.device("cpu")
        if self._alone:
            return
        try:
            self._group = torch.distributed.new_group(backend="gloo")
        except RuntimeError as error:
            self._device = device
            reason = str(error).partition("\n")[0]
            rank_zero_info(f"SIGTERM: noticed every {self._max_steps} optimizer steps, because gloo failed ({reason})")

    def any_signalled(self, signalled: bool, step: int) -> bool:
        """Whether any process was signalled; all processes get the same answer at the same step.

        Args:
            signalled: Whether this process was.
            step: Number of optimizer steps done.
        """
        if self._alone:
            return signalled
        if self._next is not None and step < self._next:
            return False
        now, (last_step, last_time) = time.monotonic(), self._last
        seconds = 0.0 if self._next is None else (now - last_time) / (step - last_step)
        flags = torch.tensor([float(signalled), seconds], dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX, group=self._group)
        any_signalled, seconds = flags.tolist()
        self._last = (step, now)
        on_device = self._device.type != "cpu"
        self._next = step + (self._max_steps if on_device else steps_between_votes(seconds, self._max_steps))
        return bool(any_signalled)


def steps_between_votes(seconds: float, max_steps: int) -> int:
    """Return how many optimizer steps are about a second, from 1 to `max_steps`.

    Args:
        seconds: Seconds that the slowest process takes for a step; 0 if that is not known.
        max_steps: The most to return.
    """
    return 1 if seconds <= 0 else max(1, min(max_steps, int(1 / seconds)))


class Preemption(Callback):
    """On SIGTERM to any process: finish the optimizer step, write `checkpoints/last.ckpt`, exit with status 143.

    In several processes, that is the optimizer step under way about a second later. `--ckpt_path last` continues the
    run. The grace period must be longer than an optimizer step (or a validation, which is not interrupted), a second
    and the writing of a checkpoint together.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._leaving = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handler; Lightning restores the former one when the run ends."""
        self._signalled = self._leaving = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._set_flag)
        stop_asking_for_signals(trainer)
        self._vote = SignalVote(
            trainer.world_size, getattr(trainer, "log_every_n_steps", 1), trainer.strategy.root_device
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint at the end of an optimizer step if any process has been signalled."""
        if is_accumulating(trainer):
            return
        if not self._vote.any_signalled(self._signalled, trainer.global_step):
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
