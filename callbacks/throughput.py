"""Speed and memory of training, measured without making the GPU wait."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from transformers import PretrainedConfig

from sft_lightning.batch import Batch
from sft_lightning.compat.lightning.loops import is_accumulating
from sft_lightning.estimation.speed import arithmetic, mean_document_length, num_matrix_entries, peak_tflops
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.startup import datamodule_of


class Throughput(Callback):
    """Log `throughput/tokens_per_second` and `throughput/supervised_fraction` at every logging interval.

    Tokens are counted without padding, over all devices. Validation and sampling between steps do not count.

    On a GPU, also log `memory/peak_gib`, the most memory allocated since the start of the run, and `throughput/mfu`,
    the share of the GPU's peak FLOP/s that training uses, without recomputed activations. MFU is not logged if the
    GPU's peak is unknown, for streamed data (the documents are not known in advance), and for mixtures of experts (a
    token uses only some of the weights).
    """

    def __init__(self) -> None:
        self._flops_per_second: float | None = None
        self._flops_per_token = 0.0
        self._reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()
        if pl_module.device.type == "cuda" and isinstance(pl_module, CausalLMModule):
            name = torch.cuda.get_device_name(pl_module.device)
            peak = peak_tflops(name)
            if peak is None:
                rank_zero_info(f"throughput/mfu: not logged, because the peak FLOP/s of {name} is not in the table")
            elif not datamodule_of(trainer).spec.streams and not _has_experts(pl_module.base_model.config):
                self._flops_per_second = peak * 1e12
                self._flops_per_token = flops_per_token(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._seconds += time.perf_counter() - self._began
        self._tokens += batch["num_tokens"]
        self._supervised += batch["num_supervised"]
        if is_accumulating(trainer):
            return
        per_device = self._tokens / self._seconds
        values = {
            "throughput/tokens_per_second": per_device * trainer.world_size,
            "throughput/supervised_fraction": self._supervised / max(1, self._tokens),
        }
        if self._flops_per_second is not None:
            values["throughput/mfu"] = per_device * self._flops_per_token / self._flops_per_second
        if pl_module.device.type == "cuda":
            values["memory/peak_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        # CPU tensors: Lightning would send plain numbers to the device, and wait.
        pl_module.log_dict({name: torch.tensor(value) for name, value in values.items()})
        if trainer.global_step % (getattr(trainer, "log_every_n_steps", 0) or 1) == 0:
            self._reset()

    def _reset(self) -> None:
        self._tokens = self._supervised = 0
        self._seconds = 0.0


def flops_per_token(trainer: Trainer, module: CausalLMModule) -> float:
    """Return the floating-point operations per token of training, from the model and the epoch plan.

    Args:
        trainer: The run's trainer.
        module: The module, with its model loaded.
    """
    documents = datamodule_of(trainer).plan(0).documents
    is_full = module.spec.adapter is None
    num_trained = sum(p.numel() for p in module.language_model.parameters() if p.requires_grad)
    return arithmetic(
        module.base_model.config,
        num_matmul=num_matrix_entries(module.base_model),
        num_adapter=0 if is_full else num_trained,
        full=is_full,
        document_length=mean_document_length(documents[:, 2] - documents[:, 1]),
    ).model


def _has_experts(config: PretrainedConfig) -> bool:
    text = config.get_text_config()
    return any((getattr(text, key, None) or 0) > 1 for key in ("num_local_experts", "num_experts", "n_routed_experts"))
