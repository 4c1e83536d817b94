"""Strategies that shard a model over processes: full fine-tuning, adapters and quantized bases, on CPU and GPU."""

from sft_lightning.strategies.fsdp2.strategy import FSDP2
from sft_lightning.strategies.registry import register_strategies
from sft_lightning.strategies.zero.strategy import DeepSpeedZeRO

__all__ = ["FSDP2", "DeepSpeedZeRO", "register_strategies"]
