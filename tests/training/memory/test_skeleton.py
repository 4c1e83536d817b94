"""A model without weights has the shapes, types and bytes of the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sft_lightning.errors import UserError
from sft_lightning.estimation.speed import num_matrix_entries
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.spec import ModelSpec
from sft_lightning.training.memory.skeleton import build_skeleton, quantized_bytes, recomputing, stored_bytes

SHAPE: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def spec(**keys: Any) -> ModelSpec:
    return ModelSpec(**{"from_config": {"model_type": "llama", **SHAPE}, "dtype": "float32", **keys})


def test_parameters_have_the_names_shapes_and_types_of_the_real_model() -> None:
    real = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    found = build_skeleton(spec(), 100)
    assert {name: (p.shape, p.dtype) for name, p in found.model.named_parameters()} == {
        name: (p.shape, p.dtype) for name, p in real.named_parameters()
    }
    assert len(found.trainable) == len(list(real.parameters()))
    assert num_matrix_entries(found.base) == 2 * (4 * 16 * 16 + 3 * 16 * 32) + 16 * 100
    assert len(found.linears) == 2 * 7


def test_an_adapter_trains_alone_whatever_its_initialization_would_read() -> None:
    plain, pissa = (build_skeleton(spec(adapter=AdapterConfig(r=2, init=init)), 100) for init in ("default", "pissa"))
    assert [p.shape for p in plain.trainable] == [p.shape for p in pissa.trainable]
    assert len(plain.trainable) == 2 * 7 * 2


def test_true_precision_converts_the_full_model() -> None:
    found = build_skeleton(spec(), 100, precision="bf16-true")
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.bfloat16}


def test_only_config_json_is_read_and_the_vocabulary_is_padded(tmp_path: Path) -> None:
    LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    found = build_skeleton(spec(from_config=None, model_name_or_path=str(tmp_path), pad_to_multiple_of=64), 100)
    assert found.base.get_input_embeddings().weight.shape == (128, 16)
    with pytest.raises(UserError, match=r"model\.model_name_or_path: cannot read the configuration of"):
        build_skeleton(spec(from_config=None, model_name_or_path=str(tmp_path / "none")), 100)


def test_frozen_and_trained_bytes_are_those_of_the_stored_types() -> None:
    found = build_skeleton(spec(adapter=AdapterConfig(r=2)), 100)
    trained = sum(parameter.numel() for parameter in found.trainable)
    frozen = sum(p.numel() for p in found.model.parameters()) - trained
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in found.model.buffers())
    assert stored_bytes(found, None) == (4 * frozen + buffers, 4 * trained)
    linears = 2 * (4 * 16 * 16 + 3 * 16 * 32)
    in_4_bits = stored_bytes(found, QuantizationConfig(bits=4, double_quant=False))[0]
    assert in_4_bits == pytest.approx(4 * (frozen - linears) + buffers + 0.5625 * linears)


def test_checkpointing_is_enabled_only_inside() -> None:
    base = build_skeleton(spec(), 100).base
    with recomputing(base, 1):
        assert base.is_gradient_checkpointing
    assert not base.is_gradient_checkpointing


def test_quantized_weights_take_their_bits_and_constants() -> None:
    assert quantized_bytes(1024, 64, QuantizationConfig(bits=4, double_quant=False)) == 1024 * 0.5625
    assert quantized_bytes(1024, 64, QuantizationConfig(bits=4)) == pytest.approx(1024 * 0.516, rel=1e-3)
    assert quantized_bytes(1024, 64, QuantizationConfig(bits=8)) == 1024 + 16 * 4
