"""The ZeRO keys under `trainer.strategy`, and the same settings in a DeepSpeed configuration."""

from __future__ import annotations

from typing import Any

import pytest

from sft_lightning.errors import UserError
from sft_lightning.strategies.sharding import zero_sharding
from sft_lightning.strategies.zero.options import (
    OFFLOAD_OPTIMIZER,
    OFFLOAD_PARAMETERS,
    ZeroOptions,
    config_of,
    nvme_folders,
    offload_block,
    sharding_of_config,
    stage_of,
)


def test_keys_become_a_deepspeed_configuration() -> None:
    assert config_of(ZeroOptions(stage=0))["zero_optimization"] == {"stage": 0}
    one = config_of(ZeroOptions(stage=1, offload_optimizer="cpu"))
    assert one["zero_optimization"][OFFLOAD_OPTIMIZER] == {"device": "cpu", "pin_memory": True}
    assert offload_block(one, OFFLOAD_OPTIMIZER)
    assert stage_of(one) == 1
    three = config_of(ZeroOptions(stage=3, offload_parameters="nvme", nvme_path="fast"))
    assert offload_block(three, OFFLOAD_PARAMETERS) == {"device": "nvme", "nvme_path": "fast"}
    assert not offload_block(three, OFFLOAD_OPTIMIZER)


def test_zero_plus_plus_keys_are_those_of_a_json() -> None:
    keys = ZeroOptions(stage=3, quantized_weights=True, quantized_gradients=True, hpz_partition_size=8)
    found = config_of(keys)["zero_optimization"]
    assert found["zero_quantized_weights"] is found["zero_quantized_gradients"] is True
    assert found["zero_hpz_partition_size"] == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stage": 4}, "must be 0, 1, 2 or 3 (got 4)"),
        ({"stage": 0, "offload_optimizer": "cpu"}, "offload_optimizer: requires stage 1 or above (got 0)"),
        ({"stage": 2, "offload_parameters": "cpu"}, "offload_parameters: requires stage 3 (got 2)"),
        ({"stage": 2, "offload_optimizer": "nvme"}, "offload_optimizer: nvme: requires stage 3 (got 2)"),
        ({"stage": 2, "quantized_weights": True}, "quantized_weights: requires stage 3"),
        ({"stage": 2, "hpz_partition_size": 8}, "hpz_partition_size: requires stage 3"),
        ({"stage": 3, "hpz_partition_size": 0}, "hpz_partition_size: must be at least 1"),
        ({"stage": 3, "offload_optimizer": "nvme"}, "nvme_path: required"),
    ],
)
def test_contradicting_keys_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        ZeroOptions(**options)
    assert said in str(error.value)


@pytest.mark.parametrize("block", [None, {}, {"device": "none"}, {"device": None}])
def test_a_block_without_a_device_offloads_nothing(block: Any) -> None:
    assert offload_block({"zero_optimization": {"offload_param": block}}, OFFLOAD_PARAMETERS) == {}


def test_nvme_folders_of_both_blocks_are_found() -> None:
    parameters = config_of(ZeroOptions(stage=3, offload_parameters="nvme", nvme_path="/nvme"))
    assert nvme_folders(parameters) == {OFFLOAD_PARAMETERS: "/nvme"}
    assert nvme_folders({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}) == {OFFLOAD_OPTIMIZER: None}
    assert nvme_folders(config_of(ZeroOptions(stage=2, offload_optimizer="cpu"))) == {}


def test_a_configuration_has_what_it_shards_and_offloads() -> None:
    assert sharding_of_config({}) == zero_sharding(0)
    config = config_of(ZeroOptions(stage=3, offload_optimizer="cpu", offload_parameters="nvme", nvme_path="/nvme"))
    assert sharding_of_config(config) == zero_sharding(3, offload_optimizer=True, offload_weights=True)
