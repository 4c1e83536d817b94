from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.quantization import load_quantized
from sft_lightning.training.checks.model.storage import check_adapted, check_storage


def quantized(folder: Path, bits: int) -> Any:
    return load_quantized(str(folder), QuantizationConfig(bits=bits), dtype=torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_layers_are_stored_in_the_bits_that_were_asked_for(bits: int, adapted: bool, model_dir: Path) -> None:
    model = quantized(model_dir, bits)
    model = add_adapter(model, AdapterConfig(r=2, modules_to_save=["lm_head"])) if adapted else model
    check = check_storage(model, bits)
    assert check.passed, check.figure
    assert check.figure.startswith(f"14 layers in {bits} bits")
    assert check_storage(model, 12 - bits).passed is False
    assert check_storage(model, None).passed is False


def test_conv1d_layers_are_found_in_their_bits(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert check_storage(quantized(tmp_path, 4), 4).passed


def test_a_base_that_is_not_quantized_is_found(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert check_storage(model, None).passed
    assert check_storage(model, 4).figure == "no layer is quantized (model.quantization.bits: 4)"
    partly = quantized(model_dir, 4)
    partly.model.layers[1].mlp.up_proj = model.model.layers[1].mlp.up_proj
    check = check_storage(partly, 4)
    assert check.passed is False
    assert check.figure == "1 layers are not quantized, unlike others of their kind: model.layers.1.mlp.up_proj"


def test_adapters_that_are_frozen_off_or_merged_in_some_layer_are_found(model_dir: Path) -> None:
    model: Any = add_adapter(AutoModelForCausalLM.from_pretrained(model_dir), AdapterConfig(r=2))
    assert check_adapted(model).passed
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_B.requires_grad_(False)
    check = check_adapted(model)
    assert check.passed is False
    assert check.figure.startswith(
        "1 layers do not train as others of their kind do: model.model.layers.0.self_attn.q_proj"
    )
    layer.lora_B.requires_grad_(True)
    layer.enable_adapters(False)
    assert "the adapter is off in 1 layers" in check_adapted(model).figure


def test_without_an_adapter_there_is_nothing_to_check(model_dir: Path) -> None:
    assert check_adapted(AutoModelForCausalLM.from_pretrained(model_dir)).passed is None
