from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft_lightning.errors import UserError
from sft_lightning.migration.arguments import GivenOptions
from sft_lightning.migration.distributed import devices, stage_name, strategy
from sft_lightning.migration.draft import Draft
from sft_lightning.migration.options import Options


def translated(given: GivenOptions, *, bits: int | None = None) -> Draft:
    draft = Draft()
    if bits is not None:
        draft.set("model.quantization", {"bits": bits})
    strategy(Options(given, (), draft), draft, quantized=bits is not None)
    return draft


def test_the_launcher_sets_devices_and_nodes() -> None:
    draft = Draft()
    launcher = {"nproc_per_node": ["8"], "nnodes": ["2"], "master_port": ["1"]}
    devices(Options(GivenOptions({}, launcher), (), draft), draft)
    assert draft.values == {"trainer.devices": 8, "trainer.num_nodes": 2}
    assert [option for option, _ in draft.omitted] == ["--master_port 1"]


def test_the_gpus_of_one_node_are_named_and_hosts_are_not_migrated() -> None:
    draft = translated(GivenOptions({}, {"include": ["localhost:0,2"], "hostfile": ["hosts"]}))
    assert draft.values == {"trainer.devices": [0, 2]}
    assert draft.omitted == [
        ("--hostfile hosts", "set trainer.num_nodes, and start the command on each node with torchrun")
    ]
    two_nodes = translated(GivenOptions({}, {"include": ["a:0@b:1"]}))
    assert [option for option, _ in two_nodes.omitted] == ["--include a:0@b:1"]


def test_a_count_that_is_not_a_number_is_not_migrated() -> None:
    draft = translated(GivenOptions({}, {"nproc_per_node": ["gpu"]}))
    assert draft.omitted == [("--nproc_per_node gpu", "not a number; set trainer.devices")]


@pytest.mark.parametrize(
    ("stage", "offload", "name"),
    [(0, True, None), (1, False, "deepspeed_stage_1"), (3, True, "deepspeed_stage_3_offload")],
)
def test_a_zero_stage_has_a_strategy(stage: int, offload: bool, name: str | None) -> None:
    assert stage_name(stage, offload=offload) == name


def test_a_deepspeed_json_is_used_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}))
    draft = translated(GivenOptions({"deepspeed": [str(file)]}))
    assert draft.values["trainer.strategy"]["init_args"] == {"config": str(file)}
    eight_bits = translated(GivenOptions({"deepspeed": [str(file)]}), bits=8)
    assert "trainer.strategy" not in eight_bits.values
    assert "an 8-bit base cannot be sharded" in eight_bits.omitted[0][1]


def scheduled(tmp_path: Path, scheduler: dict[str, Any]) -> Draft:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"scheduler": scheduler}))
    return translated(GivenOptions({"deepspeed": [str(file)], "lr_scheduler_type": ["cosine"]}))


def test_the_scheduler_of_a_deepspeed_json_wins(tmp_path: Path) -> None:
    params = {"warmup_num_steps": 20, "warmup_type": "linear"}
    draft = scheduled(tmp_path, {"type": "WarmupDecayLR", "params": params})
    assert draft.values["model.lr_scheduler.name"] == "linear"
    assert draft.values["model.lr_scheduler.warmup_steps"] == 20
    assert [option for option, _ in draft.omitted] == ["--lr_scheduler_type cosine"]


def test_a_logarithmic_or_unknown_schedule_of_a_deepspeed_json_is_remarked(tmp_path: Path) -> None:
    draft = scheduled(tmp_path, {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}})
    assert draft.values["model.lr_scheduler.name"] == "constant"
    assert ("warmup_type: log of the DeepSpeed JSON", "the warm-up is linear here") in draft.omitted
    unknown = scheduled(tmp_path, {"type": "OneCycle"})
    assert "model.lr_scheduler.name" not in unknown.values
    assert unknown.omitted[0][0] == "scheduler OneCycle of the DeepSpeed JSON"
    assert "model.lr_scheduler.name" not in scheduled(tmp_path, {"type": "auto"}).values


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("ds_zero2_no_offload.json", "deepspeed_stage_2"), ("zero3_offload.json", "deepspeed_stage_3_offload")],
)
def test_stage_and_offloading_come_from_the_name_of_a_missing_file(name: str, strategy: str) -> None:
    draft = translated(GivenOptions({"deepspeed": [name]}))
    assert draft.values["trainer.strategy"] == strategy
    assert "the file does not exist" in draft.comments["trainer.strategy"]


def test_a_missing_file_without_a_stage_in_its_name_is_not_migrated() -> None:
    draft = translated(GivenOptions({"deepspeed": ["config.json"]}))
    assert "trainer.strategy" not in draft.values
    assert draft.omitted[0][0] == "--deepspeed config.json"


@pytest.mark.parametrize(
    ("text", "message"), [("{", r"ds\.json, line 1, column 2: invalid JSON"), ("[]", "must hold a JSON object")]
)
def test_an_invalid_file_is_a_user_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=message):
        translated(GivenOptions({"deepspeed": [str(tmp_path / "ds.json")]}))


@pytest.mark.parametrize(
    ("fsdp", "strategy"),
    [(["full_shard auto_wrap"], "fsdp2"), (["full_shard", "offload"], "fsdp2_offload"), (["shard_grad_op"], None)],
)
def test_only_full_sharding_becomes_fsdp2(fsdp: list[str], strategy: str | None) -> None:
    draft = translated(GivenOptions({"fsdp": fsdp}))
    assert draft.values.get("trainer.strategy") == strategy
    assert bool(draft.omitted) == (strategy is None)


@pytest.mark.parametrize(("bits", "sharded"), [(4, True), (8, False)])
def test_only_a_4_bit_base_is_sharded(bits: int, sharded: bool) -> None:
    draft = translated(GivenOptions({"fsdp": ["full_shard"]}), bits=bits)
    assert ("trainer.strategy" in draft.values) is sharded
    assert bool(draft.omitted) is not sharded


def test_unused_parameters_of_ddp_have_a_strategy() -> None:
    draft = translated(GivenOptions({"ddp_find_unused_parameters": ["True"]}))
    assert draft.values["trainer.strategy"] == "ddp_find_unused_parameters_true"
