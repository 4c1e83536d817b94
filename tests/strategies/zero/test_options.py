"""What our own keys ask of ZeRO, and what DeepSpeed's configuration says of it."""

from __future__ import annotations

from typing import Any

import pytest

from sft_lightning.errors import UserError
from sft_lightning.strategies.zero.options import (
    OFFLOAD_OPTIMIZER,
    OFFLOAD_PARAMETERS,
    ZeroOptions,
    from_options,
    nvme_folders,
    offload_of,
    stage_of,
)


def test_keys_become_deepspeeds() -> None:
    assert from_options(ZeroOptions(stage=0))["zero_optimization"] == {"stage": 0}
    one = from_options(ZeroOptions(stage=1, offload_optimizer="cpu"))
    assert one["zero_optimization"][OFFLOAD_OPTIMIZER] == {"device": "cpu", "pin_memory": True}
    assert offload_of(one, OFFLOAD_OPTIMIZER)
    assert stage_of(one) == 1
    three = from_options(ZeroOptions(stage=3, offload_parameters="nvme", nvme_path="fast"))
    assert offload_of(three, OFFLOAD_PARAMETERS) == {"device": "nvme", "nvme_path": "fast"}
    assert not offload_of(three, OFFLOAD_OPTIMIZER)


def test_zero_plus_plus_by_our_keys_is_that_of_a_json() -> None:
    keys = ZeroOptions(stage=3, quantized_weights=True, quantized_gradients=True, hpz_partition_size=8)
    found = from_options(keys)["zero_optimization"]
    assert found["zero_quantized_weights"] is found["zero_quantized_gradients"] is True
    assert found["zero_hpz_partition_size"] == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stage": 4}, "must be 0, 1, 2 or 3 (got 4)"),
        ({"stage": 0, "offload_optimizer": "cpu"}, "stage 0 shards no optimizer state"),
        ({"stage": 2, "offload_parameters": "cpu"}, "offload_parameters: is of ZeRO-3, and stage is 2"),
        ({"stage": 2, "offload_optimizer": "nvme"}, "offload_optimizer: nvme: is of ZeRO-3, and stage is 2"),
        ({"stage": 2, "quantized_weights": True}, "quantized_weights: is of ZeRO-3"),
        ({"stage": 2, "hpz_partition_size": 8}, "hpz_partition_size: is of ZeRO-3"),
        ({"stage": 3, "hpz_partition_size": 0}, "hpz_partition_size: must be at least 1"),
        ({"stage": 3, "offload_optimizer": "nvme"}, "nvme_path: needed"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        ZeroOptions(**options)
    assert said in str(error.value)


@pytest.mark.parametrize("block", [None, {}, {"device": "none"}, {"device": None}])
def test_what_stays_is_not_offloaded(block: Any) -> None:
    assert offload_of({"zero_optimization": {"offload_param": block}}, OFFLOAD_PARAMETERS) == {}


def test_nvme_is_seen_in_either_place() -> None:
    parameters = from_options(ZeroOptions(stage=3, offload_parameters="nvme", nvme_path="/nvme"))
    assert nvme_folders(parameters) == {OFFLOAD_PARAMETERS: "/nvme"}
    assert nvme_folders({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}) == {OFFLOAD_OPTIMIZER: None}
    assert nvme_folders(from_options(ZeroOptions(stage=2, offload_optimizer="cpu"))) == {}
