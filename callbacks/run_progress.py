"""Progress of a run: a bar in a terminal, a few plain lines in a file."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sft_lightning.training.startup import datamodule_of


class RunProgress(ProgressBar):
    """Show optimizer steps, loss, tokens per second and the time left.

    Metrics are read from the device at most a few times per second, not at every step. If the output is not a terminal,
    only validations and the end of training are printed.
    """

    _REFRESH_PER_SECOND = 4

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._shown_at = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not (self._enabled and sys.stdout.isatty()):
            return
        self._bar = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
            BarColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            refresh_per_second=self._REFRESH_PER_SECOND,
        )
        self._bar.start()
        total = datamodule_of(trainer).num_optimizer_steps
        self._task = self._bar.add_task("train", total=total, completed=trainer.global_step, metrics="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is None:
            return
        now = self._bar.get_time()
        if now - self._shown_at >= 1 / self._REFRESH_PER_SECOND:
            self._shown_at = now
            self._bar.update(self._task, completed=trainer.global_step, metrics=_metrics(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._print(f"step {trainer.global_step}: {_metrics(trainer)}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, metrics=_metrics(trainer))
        self._stop()
        if self._enabled:
            self._print(f"trained {trainer.global_step} optimizer steps: {_metrics(trainer)}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, line: str) -> None:
        if self.trainer.is_global_zero:
            (self._bar.console.print if self._bar is not None else print)(line)


def _metrics(trainer: Trainer) -> str:
    shown = {
        "train/loss": "loss {:.4f}",
        "val/loss": "val loss {:.4f}",
        "throughput/tokens_per_second": "{:,.0f} tokens/s",
    }
    values = trainer.callback_metrics
    return " · ".join(text.format(float(values[key])) for key, text in shown.items() if key in values)
