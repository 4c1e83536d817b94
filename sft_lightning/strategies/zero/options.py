"""The ZeRO keys under `trainer.strategy`, and the same settings in a DeepSpeed configuration (its docs/config-json)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sft_lightning.errors import UserError
from sft_lightning.strategies.sharding import ShardingSpec, zero_sharding

OffloadDevice = Literal["cpu", "nvme"]

OFFLOAD_OPTIMIZER, OFFLOAD_PARAMETERS = "offload_optimizer", "offload_param"
"""Blocks of a DeepSpeed configuration that configure offloading."""


@dataclass(frozen=True, kw_only=True)
class ZeroOptions:
    """The keys under `trainer.strategy` (ZeRO: Rajbhandari et al., 2019, arXiv:1910.02054).

    Raises:
        UserError: If a value is out of range, a key requires another stage, or `nvme_path` is missing.
    """

    stage: int = 2
    """What is sharded: 1 the optimizer's state, 2 gradients too, 3 weights too; 0 nothing."""

    offload_optimizer: OffloadDevice | None = None
    """Offload the optimizer's state and its step; `nvme` requires stage 3."""

    offload_parameters: OffloadDevice | None = None
    """Offload the weights; requires stage 3."""

    nvme_path: str | None = None
    """Folder on a local disk; each process writes its NVMe files to this folder."""

    quantized_weights: bool = False
    """ZeRO++ (Wang et al., 2023, arXiv:2306.10209): gather weights as int8; requires stage 3 and GPUs."""

    quantized_gradients: bool = False
    """ZeRO++: send gradients as int4 when they are reduced; requires stage 3 and GPUs."""

    hpz_partition_size: int = 1
    """ZeRO++: processes (of a node) that share a second copy of the weights; 1 for no copy. Requires stage 3."""

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise UserError(f"trainer.strategy.stage: must be 0, 1, 2 or 3 (got {self.stage})")
        if self.offload_optimizer and self.stage == 0:
            raise UserError("trainer.strategy.offload_optimizer: requires stage 1 or above (got 0)")
        stage_3_keys = {
            "offload_optimizer: nvme": self.offload_optimizer == "nvme",
            "offload_parameters": self.offload_parameters is not None,
            "quantized_weights": self.quantized_weights,
            "quantized_gradients": self.quantized_gradients,
            "hpz_partition_size": self.hpz_partition_size > 1,
        }
        for key, is_set in stage_3_keys.items():
            if is_set and self.stage != 3:
                raise UserError(f"trainer.strategy.{key}: requires stage 3 (got {self.stage})")
        if self.hpz_partition_size < 1:
            raise UserError(f"trainer.strategy.hpz_partition_size: must be at least 1 (got {self.hpz_partition_size})")
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and self.nvme_path is None:
            raise UserError("trainer.strategy.nvme_path: required for nvme; name a folder on a local disk")


def config_of(options: ZeroOptions) -> dict[str, Any]:
    """Return the DeepSpeed configuration that the keys under `trainer.strategy` describe."""
    zero: dict[str, Any] = {"stage": options.stage}
    if options.stage >= 1:
        zero |= {"contiguous_gradients": True, "overlap_comm": True}
    if options.offload_optimizer:
        zero[OFFLOAD_OPTIMIZER] = _offload_block(options.offload_optimizer, options.nvme_path)
    if options.offload_parameters:
        zero[OFFLOAD_PARAMETERS] = _offload_block(options.offload_parameters, options.nvme_path)
    if options.quantized_weights:
        zero["zero_quantized_weights"] = True
    if options.quantized_gradients:
        zero["zero_quantized_gradients"] = True
    if options.hpz_partition_size > 1:
        zero["zero_hpz_partition_size"] = options.hpz_partition_size
    if options.stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True}


def _offload_block(device: OffloadDevice, nvme_path: str | None) -> dict[str, Any]:
    return {"device": "cpu", "pin_memory": True} if device == "cpu" else {"device": "nvme", "nvme_path": nvme_path}


def stage_of(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a configuration; DeepSpeed's default is 0."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offload_block(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the block of a configuration that offloads the optimizer or the weights; empty without offloading.

    Args:
        config: DeepSpeed's configuration.
        name: `OFFLOAD_OPTIMIZER` or `OFFLOAD_PARAMETERS`.
    """
    block: Mapping[str, Any] = config.get("zero_optimization", {}).get(name) or {}
    return block if block.get("device", "none") not in ("none", None) else {}


def sharding_of_config(config: Mapping[str, Any]) -> ShardingSpec:
    """Return what a configuration shards and offloads.

    Args:
        config: DeepSpeed's configuration.
    """
    return zero_sharding(
        stage_of(config),
        offload_optimizer=bool(offload_block(config, OFFLOAD_OPTIMIZER)),
        offload_weights=bool(offload_block(config, OFFLOAD_PARAMETERS)),
    )


def nvme_folders(config: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the blocks of a configuration that offload to NVMe → their folders; `None` where a folder is missing."""
    blocks = {name: offload_block(config, name) for name in (OFFLOAD_OPTIMIZER, OFFLOAD_PARAMETERS)}
    return {name: block.get("nvme_path") for name, block in blocks.items() if block.get("device") == "nvme"}
