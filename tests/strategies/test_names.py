"""What `trainer.strategy` may say."""

from __future__ import annotations

import importlib.util

import pytest
from lightning.pytorch.strategies import StrategyRegistry

from sft_lightning.errors import UserError
from sft_lightning.strategies import FSDP2, register_strategies
from sft_lightning.strategies.names import check_name, is_sharded


def test_short_names_make_strategies() -> None:
    register_strategies()
    register_strategies()  # a second time changes nothing
    assert not StrategyRegistry.get("fsdp2").offload
    assert StrategyRegistry.get("fsdp2_offload").offload


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed extra")
@pytest.mark.parametrize(("stage", "weights_too"), [(1, False), (2, False), (3, True)])
def test_every_stage_that_shards_has_a_name_with_offload(stage: int, weights_too: bool) -> None:
    register_strategies()
    zero = StrategyRegistry.get(f"deepspeed_stage_{stage}_offload").config["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["offload_optimizer"]["device"] == "cpu"
    assert ("offload_param" in zero) is weights_too


@pytest.mark.parametrize(("name", "instead"), [("fsdp", "'fsdp2'"), ("fsdp_cpu_offload", "'fsdp2_offload'")])
def test_the_first_fsdp_is_refused_with_the_second_ones_name(name: str, instead: str) -> None:
    with pytest.raises(UserError, match=instead):
        check_name(name)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2", FSDP2()])
def test_other_values_are_let_through(strategy: object) -> None:
    check_name(strategy)


@pytest.mark.parametrize(
    ("name", "sharded"),
    [("fsdp2", True), ("deepspeed_stage_3", True), ("deepspeed_stage_2", False), ("ddp", False)],
)
def test_who_shards_weights_is_known(name: str, sharded: bool) -> None:
    register_strategies()
    assert is_sharded(StrategyRegistry.get(name)) is sharded


@pytest.mark.parametrize("replicas", [0, -1])
def test_a_number_of_replicas_is_at_least_1(replicas: int) -> None:
    with pytest.raises(UserError, match=r"replicas: must be at least 1"):
        FSDP2(replicas=replicas)
