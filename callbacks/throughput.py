"""Speed and memory of training, in wall time between logging points."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from transformers import PretrainedConfig

from sft_lightning.batch import Batch
from sft_lightning.compat.lightning.loops import is_accumulating
from sft_lightning.estimation.devices import peak_tflops
from sft_lightning.estimation.speed import TrainingOperations, mean_document_length, training_operations
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.startup import datamodule_of


class Throughput(Callback):
    """Log `throughput/tokens_per_second` and `throughput/supervised_fraction` at every logging point.

    Tokens are counted without padding, over all devices, and divided by the wall time since the last logging point: the
    forward and backward pass, the optimizer, and fetching and copying batches too. At a logging point, and only there,
    this waits for the GPU. Validation and samples do not count; saving a checkpoint does.

    On a GPU, also log `memory/peak_gib`, the most memory allocated since the start of the run, and `throughput/mfu`,
    the share of the GPU's dense 16-bit peak that the matrix products and causal attention of training use, without
    recomputed activations. MFU is not logged if the GPU's peak is unknown, for streamed data (the lengths of documents
    are not known in advance), and for mixtures of experts (a token uses only some of the weights).
    """

    def __init__(self) -> None:
        self._peak: float | None = None
        self._operations = TrainingOperations(0.0, 0.0, 0.0)
        self._document_length = 0.0
        self._began = self._excluded = 0.0
        self._tokens = self._supervised = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda" and isinstance(pl_module, CausalLMModule):
            name = torch.cuda.get_device_name(pl_module.device)
            peak = peak_tflops(name)
            if peak is None:
                rank_zero_info(f"throughput/mfu: not logged, because the peak FLOP/s of {name} is not in the table")
            elif not datamodule_of(trainer).spec.streams and not _has_experts(pl_module.base_model.config):
                self.count_operations(trainer, pl_module, peak_tflops=peak)
        self._start(_now(pl_module))

    def count_operations(self, trainer: Trainer, module: CausalLMModule, *, peak_tflops: float) -> None:
        """Log MFU from now on.

        Args:
            trainer: The run's trainer, with its epoch plan.
            module: The module, with its model loaded.
            peak_tflops: Peak of the device, in 10¹² operations per second.
        """
        documents = datamodule_of(trainer).plan(0).documents
        self._document_length = mean_document_length(documents[:, 2] - documents[:, 1])
        self._operations = training_operations(module.language_model)
        self._peak = 1e12 * peak_tflops

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._tokens += batch["num_tokens"]
        self._supervised += batch["num_supervised"]
        every = getattr(trainer, "log_every_n_steps", 0)
        if is_accumulating(trainer) or not every or trainer.global_step % every:
            return
        now = _now(pl_module)
        seconds = now - self._began - self._excluded
        values = {
            "throughput/tokens_per_second": self._tokens / seconds * trainer.world_size,
            "throughput/supervised_fraction": self._supervised / max(1, self._tokens),
        }
        if self._peak is not None:
            operations = self._operations.count(
                num_tokens=self._tokens, num_supervised=self._supervised, document_length=self._document_length
            )
            values["throughput/mfu"] = operations / seconds / self._peak
        if pl_module.device.type == "cuda":
            values["memory/peak_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        # CPU tensors: Lightning would send plain numbers to the device, and wait.
        pl_module.log_dict({name: torch.tensor(value) for name, value in values.items()})
        self._start(now)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused_at = _now(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._excluded += _now(pl_module) - self._paused_at

    @contextmanager
    def paused(self, module: LightningModule) -> Iterator[None]:
        """Leave the time inside the block out.

        Args:
            module: The module that trains.
        """
        began = _now(module)
        try:
            yield
        finally:
            self._excluded += _now(module) - began

    def _start(self, now: float) -> None:
        self._began, self._excluded = now, 0.0
        self._tokens = self._supervised = 0


@contextmanager
def not_counted(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Leave what happens inside the block out of the throughput that is logged.

    Args:
        trainer: The trainer, whose callbacks need not have a `Throughput`.
        module: The module that trains.
    """
    clock = next((each for each in trainer.callbacks if isinstance(each, Throughput)), None)  # type: ignore[attr-defined]
    if clock is None:
        yield
    else:
        with clock.paused(module):
            yield


def _now(module: LightningModule) -> float:
    """Return the time in seconds, once the device has done what it was given."""
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()


def _has_experts(config: PretrainedConfig) -> bool:
    text = config.get_text_config()
    return any((getattr(text, key, None) or 0) > 1 for key in ("num_local_experts", "num_experts", "n_routed_experts"))
