"""Covers sft_lightning.models.adapters.trained_base and sft_lightning.models.base.weight_files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sft_lightning.models.adapters.folder import AdapterError
from sft_lightning.models.adapters.trained_base import (
    MANIFEST,
    TrainedBase,
    base_fingerprint,
    read_manifest,
    trained_base,
)


def write_manifest(folder: Path, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def with_changed_weights(model_dir: Path, folder: Path, change: float) -> Path:
    """A copy of a model in which one matrix of one layer is moved, as by merging a small adapter."""
    shutil.copytree(model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"] += change
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_same_weights_have_one_fingerprint_in_shards_and_in_16_or_32_bits(model_dir: Path, tmp_path: Path) -> None:
    found = base_fingerprint(str(model_dir))
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert base_fingerprint(str(tmp_path / "shards")) == base_fingerprint(str(tmp_path / "bf16")) == found


def test_weights_that_differ_a_little_in_one_matrix_have_another_fingerprint(model_dir: Path, tmp_path: Path) -> None:
    other = with_changed_weights(model_dir, tmp_path / "other", 1e-4)
    assert base_fingerprint(str(other)) != base_fingerprint(str(model_dir))


def test_random_weights_are_known_by_configuration_and_seed() -> None:
    config = {"model_type": "llama", "hidden_size": 32}
    torch.manual_seed(1)
    found = base_fingerprint(None, config)
    assert base_fingerprint(None, {**config, "hidden_size": 64}) != found
    torch.manual_seed(2)
    assert base_fingerprint(None, config) != found
    torch.manual_seed(1)
    assert base_fingerprint(None, config) == found


def test_a_base_without_readable_files_has_no_fingerprint(tmp_path: Path) -> None:
    assert base_fingerprint(str(tmp_path)) is None
    assert base_fingerprint("nobody/nothing") is None
    assert base_fingerprint("not a name") is None
    for damaged in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / damaged).write_bytes(b"version https://git-lfs.github.com/spec/v1")
        assert base_fingerprint(str(tmp_path)) is None
        (tmp_path / damaged).unlink()


def test_another_base_is_refused_with_both_names() -> None:
    trained = TrainedBase(source="runs/a/adapter", name="base-a", fingerprint="aa")
    assert trained.check("somewhere/base-a", "aa") is None
    with pytest.raises(AdapterError, match=r"trained on 'base-a' \(fingerprint aa\), but 'b' has other weights .*bb"):
        trained.check("b", "bb")


def test_what_cannot_be_verified_is_said() -> None:
    assert "has no fingerprint" in str(TrainedBase(source="peft").check("b", "bb"))
    assert "no weight files to read" in str(TrainedBase(source="a", fingerprint="aa").check("b", None))


def test_an_adapter_without_a_manifest_changes_nothing(model_dir: Path, tmp_path: Path) -> None:
    trained = trained_base(tmp_path)
    assert trained == TrainedBase(source=str(tmp_path))
    assert trained.apply_to(AutoConfig.from_pretrained(model_dir)) == []


def test_the_context_of_the_training_is_written_into_a_configuration(model_dir: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    manifest = {"rope_parameters": rope, "max_position_embeddings": 512, "trust_remote_code": True}
    config = AutoConfig.from_pretrained(model_dir)
    (line,) = trained_base(write_manifest(tmp_path, manifest)).apply_to(config)
    assert line.startswith("rope_parameters: {'rope_type': 'linear', 'factor': 4.0")
    assert config.rope_parameters == rope
    assert not hasattr(config, "trust_remote_code")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged: Expecting property name"),
        ("[1]", "expected an object, found a list"),
        ({"vocab_size": "os.system"}, "vocab_size is 'os.system'"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"rope_parameters": "yarn"}, "rope_parameters is 'yarn'"),
        ({"max_position_embeddings": True}, "max_position_embeddings is True"),
    ],
)
def test_a_damaged_manifest_is_refused_with_what_is_wrong(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        trained_base(write_manifest(tmp_path, content))


def test_a_folder_that_does_not_exist_has_no_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path / "nowhere") == {}
    assert read_manifest("nobody/nothing") == {}
