from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.bypassed import check_quantized

FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def quantized(model_type: str, folder: Path, **values: int) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, vocab_size=50, hidden_size=32, num_hidden_layers=1, **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FOUR_BITS)
    return model


def test_a_quantized_model_passes(tmp_path: Path) -> None:
    check_quantized(quantized("opt", tmp_path, num_attention_heads=2, ffn_dim=64, word_embed_proj_dim=32))


def test_a_family_that_transformers_does_not_quantize_is_refused(tmp_path: Path) -> None:
    model = quantized("falcon", tmp_path, num_attention_heads=2)
    with pytest.raises(UserError, match=r"model.quantization: nothing in this falcon model .*FalconLinear"):
        check_quantized(model)


def test_quantized_weights_that_are_read_past_their_modules_are_refused(tmp_path: Path) -> None:
    model = quantized("mamba", tmp_path, state_size=8, time_step_rank=4)
    with pytest.raises(UserError, match=r"model.quantization: mamba models read the weights of dt_proj, out_proj"):
        check_quantized(model)
