"""From a value of `trainer.strategy` to a strategy, and to what it shards."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.spec import ModelSpec
from sft_lightning.strategies import FSDP2, DeepSpeedZeRO, register_strategies
from sft_lightning.strategies.refusals import RunFacts
from sft_lightning.strategies.registry import check_strategy, sharding_of
from sft_lightning.strategies.services import services_of
from sft_lightning.strategies.sharding import REPLICATED, SHORT_NAMES, fsdp2_sharding, zero_sharding

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed extra")
SHARDED = [
    pytest.param(name, marks=needs_deepspeed if sharding.kind == "zero" else ())
    for name, sharding in SHORT_NAMES.items()
    if sharding.kind != "ddp"
]
INT8 = ModelSpec(model_name_or_path="none", quantization=QuantizationConfig(bits=8), adapter=AdapterConfig())


@pytest.mark.parametrize("name", SHARDED)
def test_a_registered_strategy_shards_what_its_short_name_says(name: str) -> None:
    register_strategies()
    register_strategies()  # a second time changes nothing
    strategy: Any = StrategyRegistry.get(name)
    assert strategy.sharding == SHORT_NAMES[name] == sharding_of(strategy) == sharding_of(name)
    assert services_of(strategy).shards_weights is SHORT_NAMES[name].shards_weights


def test_ddp_keeps_gradients_in_the_buckets_that_are_reduced() -> None:
    register_strategies()
    strategy: Any = StrategyRegistry.get("ddp")
    assert type(strategy) is DDPStrategy
    assert strategy._ddp_kwargs == {"gradient_as_bucket_view": True}


def test_lightnings_own_strategies_have_what_they_shard() -> None:
    register_strategies()
    assert sharding_of("auto") == sharding_of("ddp") == sharding_of("ddp_spawn") == REPLICATED
    assert sharding_of(ModelParallelStrategy()) == fsdp2_sharding()
    assert sharding_of("deepspeed") == zero_sharding(2)
    assert sharding_of("deepspeed_stage_3_offload_nvme").offloads_weights


@needs_deepspeed
def test_lightnings_deepspeed_strategy_shards_what_its_stage_says() -> None:
    from lightning.pytorch.strategies import DeepSpeedStrategy

    assert sharding_of(DeepSpeedStrategy(stage=1)) == zero_sharding(1)


def test_fsdp1_shards_nothing_that_could_be_planned() -> None:
    with pytest.raises(UserError, match="use 'fsdp2'"):
        sharding_of("fsdp")


@pytest.mark.parametrize("strategy", ["fsdp2", FSDP2()])
def test_a_short_name_is_checked_as_its_strategy_is(strategy: object) -> None:
    with pytest.raises(UserError, match=r"model\.quantization\.bits: 8 cannot be combined"):
        check_strategy(strategy, RunFacts(model=INT8))
    check_strategy("ddp", RunFacts(model=INT8))


@needs_deepspeed
def test_a_deepspeed_configuration_is_checked_too() -> None:
    config = {"zero_optimization": {"stage": 2, "zero_quantized_weights": True}}
    with pytest.raises(UserError, match="zero_quantized_weights"):
        check_strategy(DeepSpeedZeRO(config=config), RunFacts(model=ModelSpec(model_name_or_path="none")))
