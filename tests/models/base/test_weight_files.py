from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft_lightning.errors import UserError
from sft_lightning.models.base.weight_files import ShardWriter, read_tensors, tensor_names, weight_files

TENSORS = {f"layer.{i}.weight": torch.full((4, 8), float(i)) for i in range(5)}  # 128 bytes each


def test_few_tensors_are_written_to_one_file_without_an_index(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 10**6) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == TENSORS.keys()


def test_many_tensors_are_written_to_shards_with_an_index(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 256) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 160, "total_size": 640}
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])


def test_a_tensor_larger_than_a_shard_gets_a_file_of_its_own(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 130) as writer:
        writer.add("small", torch.zeros(4))
        writer.add("large", torch.zeros(100))
        writer.add("last", torch.zeros(4))
    assert len(weight_files(tmp_path)) == 3


def test_no_file_has_its_final_name_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path, 130) as writer:
            writer.add("a", torch.zeros(100))
            writer.add("b", torch.zeros(100))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin", "sharded safetensors", "sharded bin"])
def test_every_kind_of_file_is_read(kind: str, tmp_path: Path) -> None:
    halves = [dict(list(TENSORS.items())[:2]), dict(list(TENSORS.items())[2:])]
    parts = halves if kind.startswith("sharded") else [TENSORS]
    ending = "safetensors" if kind.endswith("safetensors") else "bin"
    stem = "model" if ending == "safetensors" else "pytorch_model"
    weight_map = {}
    for number, part in enumerate(parts):
        name = f"{stem}-{number}.{ending}" if len(parts) > 1 else f"{stem}.{ending}"
        weight_map |= dict.fromkeys(part, name)
        if ending == "safetensors":
            save_file(part, tmp_path / name)
        else:
            torch.save(part, tmp_path / name, _use_new_zipfile_serialization=kind != "old bin")
    if len(parts) > 1:
        (tmp_path / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    read = {name: tensor for file in weight_files(tmp_path) for name, tensor in read_tensors(file)}
    assert read.keys() == TENSORS.keys() == tensor_names(tmp_path)
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_safetensors_are_preferred_to_bin_files(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no weights"):
        weight_files(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"the file model-00001-of-00001.safetensors is missing"):
        weight_files(tmp_path)
