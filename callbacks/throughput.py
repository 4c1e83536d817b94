"""Speed, in tokens per second, without making the device wait."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sft_lightning.types import Batch


class Throughput(Callback):
    """Logs `throughput/tokens_per_second` and `throughput/supervised_fraction` at every logging interval.

    Tokens are counted without padding, over all devices; validation and sampling between steps do not count.
    """

    def __init__(self) -> None:
        self._reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._seconds += time.perf_counter() - self._began
        self._tokens += batch["num_tokens"]
        self._supervised += batch["num_supervised"]
        if trainer.fit_loop._should_accumulate():
            return
        pl_module.log("throughput/tokens_per_second", self._tokens * trainer.world_size / self._seconds)
        pl_module.log("throughput/supervised_fraction", self._supervised / max(1, self._tokens))
        if trainer.global_step % getattr(trainer, "log_every_n_steps", 1) == 0:
            self._reset()

    def _reset(self) -> None:
        self._tokens = self._supervised = 0
        self._seconds = 0.0
