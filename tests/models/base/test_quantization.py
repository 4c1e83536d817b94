from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.quantization import load_quantized

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 64},
    "falcon": {"num_attention_heads": 2, "bias": True},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
}
QUANTIZED = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "falcon": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "mamba": {"in_proj"},
    "falcon_mamba": {"in_proj"},
    "mamba2": {"in_proj"},
}


def saved(model_type: str, folder: Path, **changes: Any) -> PreTrainedModel:
    values = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**values, **SHAPES[model_type], **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model.eval()


def quantized_names(model: PreTrainedModel) -> set[str]:
    return {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if type(m).__module__.startswith("bitsandbytes")}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model_type", SHAPES)
def test_exactly_the_layers_that_a_family_calls_are_quantized(
    model_type: str, bits: int, tied: bool, tmp_path: Path
) -> None:
    plain = saved(model_type, tmp_path, tie_word_embeddings=tied)
    model = load_quantized(str(tmp_path), QuantizationConfig(bits=bits), dtype=torch.float32)
    assert quantized_names(model) == QUANTIZED[model_type]
    ids = torch.arange(16)[None]
    with torch.no_grad():
        found = model(ids, use_cache=False).logits
        assert not torch.allclose(found, plain(ids, use_cache=False).logits, atol=1e-4)
        for name, module in model.named_modules():
            if type(module).__module__.startswith("bitsandbytes"):
                plain.get_parameter(f"{name}.weight").copy_(dequantize_module_weight(module))
        expected = plain(ids, use_cache=False).logits
    tolerance = (1e-4 if bits == 4 else 0.03) * float(expected.abs().max())  # LLM.int8 rounds inputs too
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    adapted = add_adapter(model, AdapterConfig(r=2))
    adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    learning = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in learning} == QUANTIZED[model_type]


def test_falcon_keeps_its_own_layers_without_quantization(tmp_path: Path) -> None:
    saved("falcon", tmp_path)
    load_quantized(str(tmp_path), QuantizationConfig(), dtype=torch.float32)
    unquantized = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any(type(module) is FalconLinear for module in unquantized.modules())


def test_a_family_that_transformers_does_not_quantize_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft_lightning.models.base.quantization.plain_falcon_layers", nullcontext)
    saved("falcon", tmp_path)
    with pytest.raises(
        UserError, match=r"model.quantization: transformers quantized no layer of this falcon model .*FalconLinear"
    ):
        load_quantized(str(tmp_path), QuantizationConfig(), dtype=torch.float32)
