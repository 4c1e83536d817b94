"""What strategies shard and offload."""

from __future__ import annotations

import pytest

from sft_lightning.strategies.sharding import SHORT_NAMES, fsdp2_sharding, zero_sharding


@pytest.mark.parametrize(
    ("name", "shards", "offloads"),
    [
        ("ddp", (1, 1, 1), (False, False)),
        ("fsdp2", (4, 4, 4), (False, False)),
        ("fsdp2_offload", (4, 4, 4), (True, True)),
        ("deepspeed_stage_1", (1, 1, 4), (False, False)),
        ("deepspeed_stage_1_offload", (1, 1, 4), (False, True)),
        ("deepspeed_stage_2", (1, 4, 4), (False, False)),
        ("deepspeed_stage_2_offload", (1, 4, 4), (False, True)),
        ("deepspeed_stage_3", (4, 4, 4), (False, False)),
        ("deepspeed_stage_3_offload", (4, 4, 4), (True, True)),
    ],
)
def test_a_short_name_shards_and_offloads_what_docs_scaling_says(
    name: str, shards: tuple[int, int, int], offloads: tuple[bool, bool]
) -> None:
    sharding = SHORT_NAMES[name]
    assert sharding.name == name
    assert sharding.shards(4) == shards
    assert sharding.shards(1) == (1, 1, 1)
    assert sharding.shards_weights is (shards[0] == 4)
    assert (sharding.offloads_weights, sharding.offloads_optimizer) == offloads


def test_no_other_short_name_exists() -> None:
    assert len(SHORT_NAMES) == 9


def test_each_replica_is_sharded_over_its_own_processes() -> None:
    assert fsdp2_sharding(replicas=2).shards(8) == (4, 4, 4)


def test_a_strategy_without_a_short_name_has_the_nearest_one_in_messages() -> None:
    assert zero_sharding(3, offload_optimizer=True).name == "deepspeed_stage_3"
    assert zero_sharding(2, offload_optimizer=True).name == "deepspeed_stage_2_offload"
