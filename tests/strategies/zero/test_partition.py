"""Weights that a module reads although another module owns them, and loading of partitioned parameters."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sft_lightning.compat.deepspeed import external_weights
from sft_lightning.strategies.zero.partition import keep_weights_on_rank_0, load_part, register_external_weights

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed extra")


def adapted(*, use_dora: bool) -> Any:
    return get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], r=2, use_dora=use_dora))  # type: ignore[arg-type]


@needs_deepspeed
def test_dora_reads_the_weights_of_the_base_layer_and_of_both_low_rank_layers() -> None:
    model = adapted(use_dora=True)
    register_external_weights(model)
    layer = model.base_model.model[0]
    found = {id(weight) for weight in external_weights(layer.lora_magnitude_vector["default"])}
    wanted = (layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    assert found == {id(weight) for weight in wanted}
    assert external_weights(layer) == []


@needs_deepspeed
def test_lora_reads_no_external_weights() -> None:
    model = adapted(use_dora=False)
    register_external_weights(model)
    assert all(external_weights(module) == [] for module in model.modules())


def embedding(**options: Any) -> Any:
    config = LoraConfig(target_modules=["0"], r=2, **options)
    return get_peft_model(nn.Sequential(nn.Embedding(8, 4)), config)  # type: ignore[arg-type]


@needs_deepspeed
def test_weights_in_a_parameter_dict_are_read_by_the_module_around_it() -> None:
    model = embedding()
    register_external_weights(model)
    layer = model.base_model.model[0]
    wanted = [layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
    assert {id(weight) for weight in external_weights(layer)} == {id(weight) for weight in wanted}


@needs_deepspeed
def test_dora_on_an_embedding_reads_its_parameter_dicts_too() -> None:
    model = embedding(use_dora=True)
    register_external_weights(model)
    layer = model.base_model.model[0]
    wanted = [layer.base_layer.weight, layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
    found = external_weights(layer.lora_magnitude_vector["default"])
    assert {id(weight) for weight in found} == {id(weight) for weight in wanted}


def test_a_parameter_that_is_not_partitioned_is_left_to_load_state_dict() -> None:
    value = torch.ones(2)
    assert load_part(nn.Parameter(torch.zeros(2)), value) is value
    assert load_part(None, value) is value


def test_weights_are_converted_to_the_training_type_and_freed_on_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"bf16": {"enabled": True}}
    sender, receiver = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = sender.weight.detach().to(torch.bfloat16)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    keep_weights_on_rank_0(sender, config)
    assert torch.equal(sender.weight, expected)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    before = receiver.weight.data_ptr()
    keep_weights_on_rank_0(receiver, config)
    assert receiver.weight.dtype == torch.bfloat16
    assert receiver.weight.shape == (2, 2)
    assert receiver.weight.data_ptr() != before
