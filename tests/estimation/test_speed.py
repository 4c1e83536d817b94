"""Operations per token and seconds, by the formulas of the papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from sft_lightning.estimation.speed import (
    TrainingOperations,
    arithmetic,
    mean_document_length,
    num_matrix_entries,
    training_operations,
)
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.base.building import build_model
from sft_lightning.models.base.config import QuantizationConfig


def test_a_token_of_llama_2_7b_takes_the_published_operations() -> None:
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
    lora = arithmetic(config, num_matmul=6_607_077_376, num_adapter=39_976_960, full=False, document_length=2048)
    full = arithmetic(config, num_matmul=6_607_077_376, num_adapter=0, full=True, document_length=2048)
    assert lora.model == pytest.approx(28.28e9, rel=1e-3)
    assert full.model == pytest.approx(41.25e9, rel=1e-3)
    slow, fast = (
        lora.seconds(10**6, mfu=0.5, tflops=100, num_gpus=2, recomputed=recompute) for recompute in (True, False)
    )
    assert fast == pytest.approx(28.28e15 / 1e14, rel=1e-3)
    assert slow / fast == pytest.approx(1 + lora.recomputed / lora.model)


def test_the_mean_document_length_is_a_mean_over_tokens() -> None:
    assert mean_document_length(np.array([1, 3])) == 2.5
    assert mean_document_length(np.array([], np.int64)) == 0


def test_matrices_are_counted_with_the_head_and_without_adapters() -> None:
    llama = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(llama)
    expected = 2 * (4 * 16 * 16 + 3 * 16 * 32) + 50 * 16
    assert num_matrix_entries(model) == expected
    add_adapter(model, AdapterConfig(r=4))
    assert num_matrix_entries(model) == expected
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
    assert num_matrix_entries(gpt2) == 2 * (4 + 8) * 16 * 16 + 50 * 16


def operations(**changes: Any) -> tuple[PreTrainedModel, LlamaConfig]:
    values = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**{**values, "num_attention_heads": 2, **changes})
    return AutoModelForCausalLM.from_config(config), config


LAYERS, HEAD = 2 * (4 * 16 * 16 + 3 * 16 * 32), 50 * 16


def test_every_trained_weight_takes_three_products_and_a_frozen_one_two() -> None:
    model, _ = operations()
    found = training_operations(model)
    assert found.per_token == 6 * LAYERS
    assert found.per_supervised_token == 6 * HEAD
    assert found.per_pair == 6 * 16 * 2
    model.lm_head.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    found = training_operations(model)
    assert found.per_token == (4 + 6) * LAYERS / 2
    assert found.per_supervised_token == 4 * HEAD


def test_a_frozen_base_computes_no_gradients_of_its_weights() -> None:
    model, _ = operations()
    adapter = 4 * 2 * (4 * (16 + 16) + 3 * (16 + 32))
    assert training_operations(add_adapter(model, AdapterConfig(r=4))).per_token == 4 * LAYERS + 6 * adapter


def test_a_head_that_is_trained_beside_an_adapter_counts_once() -> None:
    model, _ = operations()
    adapted = add_adapter(model, AdapterConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert training_operations(adapted).per_supervised_token == 6 * HEAD


def test_a_quantized_weight_counts_what_it_multiplies_with() -> None:
    config = AutoConfig.for_model("llama", **SHAPE)
    plain = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    quantized = build_model(config, QuantizationConfig(bits=4), dtype=torch.bfloat16).requires_grad_(False)
    assert training_operations(quantized) == training_operations(plain)


SHAPE = {
    "vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def test_the_operations_of_an_interval_have_the_head_at_supervised_tokens_only() -> None:
    found = TrainingOperations(per_token=10.0, per_supervised_token=100.0, per_pair=2.0)
    assert found.count(num_tokens=1000, num_supervised=10, document_length=50.0) == 1000 * (10 + 2 * 50) + 10 * 100


def test_both_counts_agree_where_every_token_is_supervised() -> None:
    model, config = operations()
    planned = arithmetic(config, num_matmul=LAYERS + HEAD, num_adapter=0, full=True, document_length=30.0)
    assert training_operations(model).count(num_tokens=1, num_supervised=1, document_length=30.0) == planned.model
