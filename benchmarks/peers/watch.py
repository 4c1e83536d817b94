"""Time the steps of our training; a separate module, because the configuration names its class."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from step_times import StepTimes


class Watch(Callback):
    """Times the steps. As a callback of the user, it is called after those of the trainer."""

    times: StepTimes

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.times.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.times.step(int(batch["num_tokens"]), float(outputs["loss"]))
