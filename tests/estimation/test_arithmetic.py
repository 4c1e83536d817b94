"""Bytes, operations and shares are what the formulas of the papers say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from sft_lightning.estimation.memory import Memory, Setup, changes, largest, largest_batch_size, largest_max_length
from sft_lightning.estimation.skeleton import quantized_bytes
from sft_lightning.estimation.speed import arithmetic, mean_document_length
from sft_lightning.estimation.tracker import StorageTracker
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.strategies.sharding import REPLICATED

SETUP = Setup(batch_size=4, max_length=2048, checkpointing=False, bits=None, sharding=REPLICATED)


def memory(setup: Setup) -> Memory:
    tokens = setup.batch_size * setup.max_length
    return Memory(weights=100, adapter=1, gradients=1, optimizer=2, activations=tokens, temporary=10)


def test_a_token_of_llama_2_7b_takes_what_is_published() -> None:
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
    lora = arithmetic(config, num_matmul=6_607_077_376, num_adapter=39_976_960, full=False, document_length=2048)
    full = arithmetic(config, num_matmul=6_607_077_376, num_adapter=0, full=True, document_length=2048)
    assert lora.model == pytest.approx(28.28e9, rel=1e-3)
    assert full.model == pytest.approx(41.25e9, rel=1e-3)
    slow, fast = (
        lora.seconds(10**6, mfu=0.5, tflops=100, num_gpus=2, checkpointing=recompute) for recompute in (True, False)
    )
    assert fast == pytest.approx(28.28e15 / 1e14, rel=1e-3)
    assert slow / fast == pytest.approx(1 + lora.recomputed / lora.model)


def test_the_length_of_documents_is_a_mean_over_tokens() -> None:
    assert mean_document_length(np.array([1, 3])) == 2.5
    assert mean_document_length(np.array([], np.int64)) == 0


def test_quantized_weights_take_their_bits_and_constants() -> None:
    assert quantized_bytes(1024, 64, QuantizationConfig(bits=4, double_quant=False)) == 1024 * 0.5625
    assert quantized_bytes(1024, 64, QuantizationConfig(bits=4)) == pytest.approx(1024 * 0.516, rel=1e-3)
    assert quantized_bytes(1024, 64, QuantizationConfig(bits=8)) == 1024 + 16 * 4


def test_the_largest_that_fits_is_found() -> None:
    assert largest(lambda n: n <= 37, 100) == 37
    assert largest(lambda n: False, 100) == 0
    assert largest_batch_size(memory, SETUP, 114 + 3 * 2048) == 3
    assert largest_max_length(memory, SETUP, 114 + 4 * 1000, 4096) == 960
    assert largest_max_length(memory, SETUP, 50, 4096) == 0


def test_changes_go_from_the_cheapest_on_and_leave_out_what_is_so_already() -> None:
    words = [change.words for change in changes(SETUP, has_adapter=True, can_quantize=True)]
    assert words[0].startswith("data.batch_size: 1, with 4 times")
    assert words[1:3] == ["model.gradient_checkpointing: true", "model.quantization: {bits: 4}"]
    assert words[-1].startswith("data.max_length: 512")
    done = replace(SETUP, batch_size=1, checkpointing=True, bits=4)
    first = next(iter(changes(done, has_adapter=True, can_quantize=True)))
    assert first.words.startswith("2 GPUs")


def test_storages_count_once_and_until_they_are_freed() -> None:
    known = torch.zeros(1000)
    with StorageTracker([known]) as tracker:
        view = known[:10]
        made = known + 1
        again = made.view(10, 100)
        assert tracker.live == 4000
        del made, view
        assert tracker.live == 4000
        del again
        assert tracker.live == 0
    assert tracker.peak == 4000
