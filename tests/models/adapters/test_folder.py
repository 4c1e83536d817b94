from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.folder import (
    AdapterError,
    attach_adapter,
    base_tensors,
    name_in_base,
    read_config,
    read_weights,
)

Make = Callable[..., Any]
"""A helper of conftest.py."""


def edited(weights: dict[str, torch.Tensor], change: str) -> dict[str, torch.Tensor]:
    name = sorted(weights)[0]
    if change == "missing":
        return {key: tensor for key, tensor in weights.items() if key != name}
    if change == "unknown":
        return {**weights, name.replace("layers.0", "layers.7"): weights[name].clone()}
    return {**weights, name: torch.zeros(3, 3)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "missing base_model.*, left over none"),
        ("unknown", r"missing none, left over base_model.*layers\.7"),
        ("shape", r"has the shape \(3, 3\), expected"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(adapted: Make, change: str, said: str, tmp_path: Path) -> None:
    adapted(r=2).save_pretrained(str(tmp_path), save_embedding_layers=False)
    file = tmp_path / "adapter_model.safetensors"
    save_file(edited(load_file(file), change), file)
    with pytest.raises(UserError, match=rf"model\.adapter\.path: .*{said}"):
        adapted(path=str(tmp_path))


def test_a_folder_without_a_configuration_or_weights_is_named(adapted: Make, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"is not an adapter folder: it has no adapter_config\.json"):
        read_config(tmp_path)
    adapted(r=2).save_pretrained(str(tmp_path), save_embedding_layers=False)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors \(nor \.bin\)"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("file", "read", "said"),
    [
        ("adapter_config.json", read_config, "PEFT cannot read the configuration"),
        ("adapter_model.safetensors", read_weights, "PEFT cannot read the weights"),
    ],
)
def test_a_file_that_peft_cannot_read_is_named(file: str, read: Make, said: str, adapted: Make, tmp_path: Path) -> None:
    adapted(r=2).save_pretrained(str(tmp_path), save_embedding_layers=False)
    (tmp_path / file).write_text("{")
    with pytest.raises(AdapterError, match=said):
        read(tmp_path)


def test_the_names_in_the_base_leave_out_what_peft_added() -> None:
    assert name_in_base("base_model.model.model.layers.0.q_proj.base_layer.weight") == "model.layers.0.q_proj.weight"
    assert name_in_base("model.norm.weight") == "model.norm.weight"


def test_tensors_that_replace_those_of_the_base_are_found(adapted: Make, model_dir: Path, tmp_path: Path) -> None:
    adapted(r=2, bias="all", modules_to_save=["lm_head"]).save_pretrained(str(tmp_path), save_embedding_layers=False)
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    weights = {**read_weights(tmp_path), "base_model.model.model.norm.weight": torch.ones(32)}
    assert base_tensors(weights, base).keys() == {"lm_head.weight", "model.norm.weight"}


def test_an_adapter_is_attached_with_its_weights(adapted: Make, model_dir: Path, tmp_path: Path) -> None:
    model = adapted(r=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    attached = attach_adapter(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in attached.named_parameters())
