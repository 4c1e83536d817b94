"""Which weights a module uses that its own forward pass does not gather."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from sft_lightning.compat.deepspeed import external_weights
from sft_lightning.strategies.zero.partition import name_external_weights

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed extra")


def adapted(*, use_dora: bool) -> Any:
    return get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], r=2, use_dora=use_dora))  # type: ignore[arg-type]


@needs_deepspeed
def test_they_are_those_of_the_base_layer_and_of_both_low_rank_layers() -> None:
    model = adapted(use_dora=True)
    name_external_weights(model)
    layer = model.base_model.model[0]
    found = {id(weight) for weight in external_weights(layer.lora_magnitude_vector["default"])}
    wanted = (layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    assert found == {id(weight) for weight in wanted}
    assert external_weights(layer) == []


@needs_deepspeed
def test_lora_uses_none() -> None:
    model = adapted(use_dora=False)
    name_external_weights(model)
    assert all(external_weights(module) == [] for module in model.modules())


def embedding(**options: Any) -> Any:
    config = LoraConfig(target_modules=["0"], r=2, **options)
    return get_peft_model(nn.Sequential(nn.Embedding(8, 4)), config)  # type: ignore[arg-type]


@needs_deepspeed
def test_weights_in_a_dict_of_parameters_are_used_by_the_module_around_it() -> None:
    model = embedding()
    name_external_weights(model)
    layer = model.base_model.model[0]
    wanted = [layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
    assert {id(weight) for weight in external_weights(layer)} == {id(weight) for weight in wanted}


@needs_deepspeed
def test_dora_on_an_embedding_uses_those_too() -> None:
    model = embedding(use_dora=True)
    name_external_weights(model)
    layer = model.base_model.model[0]
    wanted = [layer.base_layer.weight, layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
    found = external_weights(layer.lora_magnitude_vector["default"])
    assert {id(weight) for weight in found} == {id(weight) for weight in wanted}
