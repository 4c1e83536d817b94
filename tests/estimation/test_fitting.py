"""What fits into a budget of memory, and which changes make a configuration fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sft_lightning.estimation.fitting import (
    changes,
    largest,
    largest_batch_size,
    largest_max_length,
    largest_model,
)
from sft_lightning.strategies.sharding import REPLICATED, fsdp2_sharding
from sft_lightning.training.memory.parts import Memory, Setup

SETUP = Setup(batch_size=4, max_length=2048, recomputation=0, bits=None, sharding=REPLICATED)


def memory(setup: Setup) -> Memory:
    tokens = setup.batch_size * setup.max_length
    return Memory(weights=100, adapter=1, gradients=1, optimizer=2, activations=tokens, temporary=10)


def test_the_largest_batch_size_and_max_length_that_fit_are_found() -> None:
    assert largest(lambda n: n <= 37, 100) == 37
    assert largest(lambda n: False, 100) == 0
    assert largest_batch_size(memory, SETUP, 114 + 3 * 2048) == 3
    assert largest_max_length(memory, SETUP, 114 + 4 * 1000, 4096) == 960
    assert largest_max_length(memory, SETUP, 50, 4096) == 0


def test_changes_are_cheapest_first_and_skip_what_is_already_set() -> None:
    words = [change.words for change in changes(SETUP, has_adapter=True, can_quantize=True)]
    assert words[0].startswith("data.batch_size: 1 and 4 times")
    assert words[1:4] == [
        "model.gradient_checkpointing: selective", "model.gradient_checkpointing: true", "model.quantization: {bits: 4}"
    ]  # fmt: skip
    assert words[-1].startswith("data.max_length: 512")
    done = replace(SETUP, batch_size=1, recomputation=1, bits=4)
    first = next(iter(changes(done, has_adapter=True, can_quantize=True)))
    assert first.words.startswith("2 GPUs")


def test_a_model_that_is_sharded_over_enough_gpus_gets_no_more_of_them() -> None:
    sharded = replace(SETUP, batch_size=1, recomputation=1, bits=4, sharding=fsdp2_sharding(), num_gpus=8)
    words = [change.words for change in changes(sharded, has_adapter=True, can_quantize=True)]
    assert all(each.startswith("data.max_length") for each in words)


def test_a_base_is_quantized_only_under_an_adapter_and_from_a_checkpoint() -> None:
    for has_adapter, can_quantize in ((False, True), (True, False)):
        found = changes(SETUP, has_adapter=has_adapter, can_quantize=can_quantize)
        assert not [change for change in found if "quantization" in change.words]


def test_the_largest_model_grows_with_the_memory_beside_the_micro_batch() -> None:
    weights_only = Memory(weights=2e9, adapter=0, gradients=0, optimizer=0, activations=0, temporary=0)
    assert largest_model(weights_only, 10**9, 8e9) == pytest.approx(4e9, rel=1e-3)
    micro_batch_only = Memory(weights=0, adapter=0, gradients=0, optimizer=0, activations=1e9, temporary=1e9)
    assert largest_model(micro_batch_only, 10**9, 8e9) == pytest.approx(8e9, rel=1e-3)  # 4 times, to the power of 3/2
