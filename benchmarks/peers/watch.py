"""Marks the steps of our training; a module of its own because the configuration names it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from step_times import StepTimes


class Watch(Callback):
    """Marks the steps; a callback that is not of the trainer's own and so the last that is called."""

    times: StepTimes

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.times.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.times.step(int(batch["num_tokens"]), float(outputs["loss"]))
