"""From a value of `trainer.strategy` to a strategy, and to what it shards."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, StrategyRegistry

from sft_lightning.strategies.fsdp2.strategy import FSDP2
from sft_lightning.strategies.names import DDP, check_name
from sft_lightning.strategies.refusals import RunFacts, check_run
from sft_lightning.strategies.sharded_strategy import ShardedStrategy
from sft_lightning.strategies.sharding import REPLICATED, SHORT_NAMES, ShardingSpec, fsdp2_sharding, zero_sharding
from sft_lightning.strategies.zero.options import sharding_of_config
from sft_lightning.strategies.zero.strategy import DeepSpeedZeRO

_LIGHTNINGS = {
    "deepspeed": zero_sharding(2),
    "deepspeed_stage_3_offload_nvme": zero_sharding(3, offload_optimizer=True, offload_weights=True),
}
"""Names that only Lightning registers → what they shard."""


def register_strategies() -> None:
    """Let `trainer.strategy` accept our short names; Lightning's other names stay.

    Under `ddp`, which `auto` takes for several devices, gradients are views of the buckets that are reduced, instead of
    copies beside them.
    """
    StrategyRegistry.register(
        DDP, DDPStrategy, "DDP", override=True, gradient_as_bucket_view=True, start_method="popen"
    )
    for name, sharding in SHORT_NAMES.items():
        if sharding.kind == "fsdp2":
            StrategyRegistry.register(name, FSDP2, "FSDP2", override=True, offload=sharding.offloads_weights)
        elif sharding.kind == "zero":
            StrategyRegistry.register(
                name,
                DeepSpeedZeRO,
                f"ZeRO stage {sharding.stage}",
                override=True,
                stage=sharding.stage,
                offload_optimizer="cpu" if sharding.offloads_optimizer else None,
                offload_parameters="cpu" if sharding.offloads_weights else None,
            )


def sharding_of(strategy: object) -> ShardingSpec:
    """Return what a value of `trainer.strategy` shards; nothing if it is neither FSDP2 nor DeepSpeed.

    Args:
        strategy: A short name, or a strategy object.

    Raises:
        UserError: If it names FSDP1.
    """
    check_name(strategy)
    if isinstance(strategy, ShardedStrategy):
        return strategy.sharding
    if isinstance(strategy, DeepSpeedStrategy):  # Lightning's own
        return sharding_of_config(strategy.config or {})
    if isinstance(strategy, ModelParallelStrategy):
        return fsdp2_sharding()
    return {**SHORT_NAMES, **_LIGHTNINGS}.get(str(strategy), REPLICATED)


def check_strategy(strategy: object, run: RunFacts) -> None:
    """Check that a strategy can train a model, as `fit` does before it reads any weight.

    Args:
        strategy: A value of `trainer.strategy`: a short name, or a strategy object.
        run: The model and the processes.

    Raises:
        UserError: If it cannot.
    """
    if isinstance(strategy, ShardedStrategy):
        strategy.check(run)
    else:
        check_run(run, sharding_of(strategy))
