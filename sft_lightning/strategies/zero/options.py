"""What is asked of ZeRO: by our own keys, and as a DeepSpeed configuration says it (DeepSpeed's docs/config-json)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sft_lightning.errors import UserError
from sft_lightning.strategies.sharding import ShardingSpec, zero_sharding

OffloadDevice = Literal["cpu", "nvme"]

OFFLOAD_OPTIMIZER, OFFLOAD_PARAMETERS = "offload_optimizer", "offload_param"
"""DeepSpeed's names of the blocks that say what is offloaded."""


@dataclass(frozen=True, kw_only=True)
class ZeroOptions:
    """What our own keys say of ZeRO (Rajbhandari et al., 2019, arXiv:1910.02054).

    Raises:
        UserError: If the stage is none of 0..3, or something is offloaded that the stage does not shard.
    """

    stage: int = 2
    """0 shards nothing, 1 the optimizer's state, 2 gradients too, 3 weights too."""

    offload_optimizer: OffloadDevice | None = None
    """Where the optimizer's state and its step go; `nvme`: stage 3."""

    offload_parameters: OffloadDevice | None = None
    """Where weights wait; stage 3."""

    nvme_path: str | None = None
    """Folder on a local disk for what is offloaded to NVMe."""

    quantized_weights: bool = False
    """ZeRO++ (Wang et al., 2023, arXiv:2306.10209): gather weights as int8; stage 3, and GPUs."""

    quantized_gradients: bool = False
    """ZeRO++: reduce gradients as int4 and int8, between nodes and within; stage 3, and GPUs."""

    hpz_partition_size: int = 1
    """ZeRO++: processes of a secondary partition, those of a node; 1 for none; stage 3."""

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise UserError(f"trainer.strategy.stage: must be 0, 1, 2 or 3 (got {self.stage})")
        if self.offload_optimizer and self.stage == 0:
            raise UserError("trainer.strategy.offload_optimizer: stage 0 shards no optimizer state; set stage 1 or 2")
        of_stage_3 = {
            "offload_optimizer: nvme": self.offload_optimizer == "nvme",
            "offload_parameters": self.offload_parameters is not None,
            "quantized_weights": self.quantized_weights,
            "quantized_gradients": self.quantized_gradients,
            "hpz_partition_size": self.hpz_partition_size > 1,
        }
        for key, wanted in of_stage_3.items():
            if wanted and self.stage != 3:
                raise UserError(f"trainer.strategy.{key}: is of ZeRO-3, and stage is {self.stage}; set stage: 3")
        if self.hpz_partition_size < 1:
            raise UserError(f"trainer.strategy.hpz_partition_size: must be at least 1 (got {self.hpz_partition_size})")
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and self.nvme_path is None:
            raise UserError("trainer.strategy.nvme_path: needed to offload to nvme; name a folder on a local disk")


def from_options(options: ZeroOptions) -> dict[str, Any]:
    """Return the `zero_optimization` that our keys describe, in a configuration of its own."""
    zero: dict[str, Any] = {"stage": options.stage}
    if options.stage >= 1:
        zero |= {"contiguous_gradients": True, "overlap_comm": True}
    if options.offload_optimizer:
        zero[OFFLOAD_OPTIMIZER] = _offload(options.offload_optimizer, options.nvme_path)
    if options.offload_parameters:
        zero[OFFLOAD_PARAMETERS] = _offload(options.offload_parameters, options.nvme_path)
    if options.quantized_weights:
        zero["zero_quantized_weights"] = True
    if options.quantized_gradients:
        zero["zero_quantized_gradients"] = True
    if options.hpz_partition_size > 1:
        zero["zero_hpz_partition_size"] = options.hpz_partition_size
    if options.stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True}


def _offload(device: OffloadDevice, nvme_path: str | None) -> dict[str, Any]:
    return {"device": "cpu", "pin_memory": True} if device == "cpu" else {"device": "nvme", "nvme_path": nvme_path}


def stage_of(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a configuration; 0 where it says nothing."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offload_of(config: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """Return what a configuration says of offloading the optimizer or the weights; empty where they stay.

    Args:
        config: DeepSpeed's configuration.
        what: `OFFLOAD_OPTIMIZER` or `OFFLOAD_PARAMETERS`.
    """
    block: Mapping[str, Any] = config.get("zero_optimization", {}).get(what) or {}
    return block if block.get("device", "none") not in ("none", None) else {}


def sharding_of_config(config: Mapping[str, Any]) -> ShardingSpec:
    """Return what a configuration shards and offloads.

    Args:
        config: DeepSpeed's configuration.
    """
    return zero_sharding(
        stage_of(config),
        offload_optimizer=bool(offload_of(config, OFFLOAD_OPTIMIZER)),
        offload_weights=bool(offload_of(config, OFFLOAD_PARAMETERS)),
    )


def nvme_folders(config: Mapping[str, Any]) -> dict[str, str | None]:
    """Return what a configuration offloads to NVMe, and the folder that it names for it."""
    blocks = {what: offload_of(config, what) for what in (OFFLOAD_OPTIMIZER, OFFLOAD_PARAMETERS)}
    return {what: block.get("nvme_path") for what, block in blocks.items() if block.get("device") == "nvme"}
