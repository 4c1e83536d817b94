"""Short names of strategies for `trainer.strategy`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import Strategy, StrategyRegistry

from sft_lightning.errors import UserError
from sft_lightning.strategies.fsdp2.strategy import FSDP2
from sft_lightning.strategies.sharded_strategy import WholeExports
from sft_lightning.strategies.zero.strategy import DeepSpeedZeRO

_FSDP1 = {"fsdp": "fsdp2", "fsdp_cpu_offload": "fsdp2_offload"}


def register_strategies() -> None:
    """Let `trainer.strategy` take our names; those of Lightning stay."""
    StrategyRegistry.register("fsdp2", FSDP2, "FSDP2, fully sharded", override=True)
    StrategyRegistry.register("fsdp2_offload", FSDP2, "FSDP2, shards in host memory", override=True, offload=True)
    for stage in (1, 2, 3):
        name = f"deepspeed_stage_{stage}"
        StrategyRegistry.register(name, DeepSpeedZeRO, f"ZeRO stage {stage}", override=True, stage=stage)
    offload: dict[str, Any] = {"override": True, "offload_optimizer": "cpu"}
    for stage in (1, 2):
        name = f"deepspeed_stage_{stage}_offload"
        StrategyRegistry.register(name, DeepSpeedZeRO, f"ZeRO-{stage}, Adam on the host", stage=stage, **offload)
    offload["offload_parameters"] = "cpu"
    StrategyRegistry.register(
        "deepspeed_stage_3_offload", DeepSpeedZeRO, "ZeRO-3, weights and Adam on the host", stage=3, **offload
    )


def check_name(strategy: object) -> None:
    """Check a value of `trainer.strategy`.

    Raises:
        UserError: If it names FSDP1, which clips no sharded gradients (Lightning#19235) and knows no mixed types.
    """
    if isinstance(strategy, str) and strategy in _FSDP1:
        raise UserError(
            f"trainer.strategy: {strategy!r} is the first FSDP, which neither clips gradients by their norm nor shards "
            f"an adapter over a base of another type; use {_FSDP1[strategy]!r}"
        )


def is_sharded(strategy: Strategy) -> bool:
    """Whether a strategy leaves no process with the whole model: a forward pass is then one of all processes."""
    return isinstance(strategy, WholeExports) and strategy.shards_weights
