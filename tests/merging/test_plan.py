from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sft_lightning.errors import UserError
from sft_lightning.merging.merge import MergeOptions, merge_adapters
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.trained_base import base_fingerprint

Make = Callable[..., Any]
"""A helper of conftest.py."""


def test_an_adapter_with_fewer_tokens_than_its_base_is_refused(
    tmp_path: Path,
    llama_config: Make,
    make_base: Make,
    make_adapter: Make,
) -> None:
    base = make_base(tmp_path / "base", llama_config(64))
    larger = make_base(tmp_path / "larger", llama_config(80))
    adapter = make_adapter(base, tmp_path / "adapter", AdapterConfig(r=2, modules_to_save=["embed_tokens"]))
    with pytest.raises(UserError, match="trained with 64 tokens, but the model that it is merged into has 80"):
        merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(model_name_or_path=str(larger)))


def test_a_base_that_is_stored_quantized_is_refused(adapter: Path, model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "base")
    config = json.loads((model_dir / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="contains quantized weights"):
        merge_adapters([str(adapter)], str(tmp_path / "m"), MergeOptions(model_name_or_path=str(tmp_path / "base")))


def test_a_longer_context_of_the_run_is_in_the_merged_configuration(adapter: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (adapter / "run_manifest.json").write_text(json.dumps({"rope_parameters": rope}))
    merge_adapters([str(adapter)], str(tmp_path / "merged"))
    assert AutoConfig.from_pretrained(tmp_path / "merged").rope_parameters == rope


def test_an_adapter_of_another_base_is_refused(adapter: Path, model_dir: Path, tmp_path: Path) -> None:
    facts = {"base": "the/original", "base_fingerprint": base_fingerprint(str(model_dir))}
    (adapter / "run_manifest.json").write_text(json.dumps(facts))
    assert merge_adapters([str(adapter)], str(tmp_path / "same"), MergeOptions(verify=False)).unverified is None
    manifest = json.loads((tmp_path / "same" / "run_manifest.json").read_text())
    assert manifest["base_fingerprint"] == facts["base_fingerprint"]
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir)).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"merge --adapter: .* was trained on 'the/original' .* has other weights"):
        merge_adapters([str(adapter)], str(tmp_path / "m"), MergeOptions(model_name_or_path=str(tmp_path / "other")))


def test_an_adapter_without_a_manifest_is_merged_and_said_to_be_unverified(adapter: Path, tmp_path: Path) -> None:
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(verify=False))
    assert "cannot be verified" in str(report.unverified)


def test_a_folder_that_is_not_an_adapter_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"merge --adapter: .* is not an adapter folder"):
        merge_adapters([str(model_dir)], str(tmp_path / "merged"))


def test_a_base_that_cannot_be_found_is_named(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load a model from 'nowhere/at/all'"):
        merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(model_name_or_path="nowhere/at/all"))


def test_adapters_of_different_bases_are_refused(
    model_dir: Path, adapter: Path, tmp_path: Path, make_adapter: Make
) -> None:
    shutil.copytree(model_dir, tmp_path / "other_base")
    other = make_adapter(tmp_path / "other_base", tmp_path / "other")
    with pytest.raises(UserError, match="different bases"):
        merge_adapters([str(adapter), str(other)], str(tmp_path / "merged"))
