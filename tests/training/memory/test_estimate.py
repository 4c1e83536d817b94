"""Memory of each part of a small model under each strategy, against sums by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.strategies.sharding import REPLICATED, ShardingSpec, fsdp2_sharding, zero_sharding
from sft_lightning.training.memory.estimate import Estimator
from sft_lightning.training.memory.parts import Memory, Setup
from sft_lightning.training.memory.simulation import simulate_step
from sft_lightning.training.memory.skeleton import build_skeleton
from sft_lightning.training.spec import TrainingSpec

SHAPE = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip
EMBEDDING = 1000 * 64
LAYER = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
MODEL = 2 * EMBEDDING + 3 * LAYER + 64
LORA = 3 * 4 * (4 * (64 + 64) + 3 * (64 + 128))
"""Parameters of rank 4 on every linear layer."""

BUCKET = 500_000_000


def estimator(adapter: AdapterConfig | None = None, precision: str = "32-true") -> Estimator:
    spec = TrainingSpec(
        from_config=SHAPE, tokenizer_name_or_path="none", dtype="float32", adapter=adapter, optimizer=torch.optim.AdamW
    )
    skeleton = build_skeleton(spec, 1000, precision)
    return Estimator(spec, skeleton, precision=precision, max_length=32, accumulates=False)


def memory(estimator: Estimator, sharding: ShardingSpec, num_gpus: int = 4, bits: int | None = None) -> Memory:
    setup = Setup(batch_size=1, max_length=32, recomputation=0, bits=bits, sharding=sharding, num_gpus=num_gpus)
    return estimator.memory(setup)


def test_one_gpu_holds_the_full_model_and_no_buffers() -> None:
    found = memory(estimator(), REPLICATED, 1)
    assert found.weights == pytest.approx(4 * MODEL, rel=1e-3)  # and the rotary frequencies
    assert found.gradients == 4 * MODEL
    assert found.optimizer == pytest.approx(8 * MODEL, rel=1e-3)
    assert found.communication == 0


def test_gradients_of_one_gpu_count_at_the_peak_and_sharded_ones_beside_it() -> None:
    full = estimator()
    options: Any = {"batch_size": 1, "max_length": 32, "recomputation": 0}
    alone, divided = memory(full, REPLICATED, 1), memory(full, fsdp2_sharding())
    step = simulate_step(full.skeleton, **options)
    assert alone.activations + alone.temporary + alone.gradients == step.peak
    assert step.peak < step.kept + 4 * MODEL
    waiting = simulate_step(full.skeleton, **options, has_gradients=True)
    assert divided.activations == waiting.kept
    assert divided.activations + divided.temporary == waiting.peak


def test_ddp_holds_the_full_model_and_a_copy_of_the_gradients() -> None:
    found = memory(estimator(), REPLICATED)
    assert (found.gradients, found.communication) == (4 * MODEL, 4 * MODEL)


def test_fsdp2_shards_everything_and_gathers_two_layers_and_the_parameters_outside_them() -> None:
    found = memory(estimator(), fsdp2_sharding())
    assert found.weights == pytest.approx(MODEL, rel=1e-3)
    assert found.gradients == MODEL
    assert found.optimizer == pytest.approx(2 * MODEL, rel=1e-3)
    # The untied embedding is a group, and the largest one here; the head and the last norm are what is left.
    assert found.communication == 4 * (EMBEDDING + 64 + 2 * EMBEDDING + EMBEDDING + 64)
    offloaded = memory(estimator(), fsdp2_sharding(offload=True))
    assert (offloaded.weights, offloaded.gradients, offloaded.optimizer) == (0, 0, 0)
    assert offloaded.communication == found.communication


def test_zero_casts_to_16_bits_and_keeps_a_float32_copy_of_trained_weights() -> None:
    full = estimator(precision="bf16-mixed")
    first, second, third = (memory(full, zero_sharding(stage)) for stage in (1, 2, 3))
    assert first.weights == second.weights == pytest.approx(2 * MODEL, rel=1e-3)
    assert third.weights == pytest.approx(first.weights / 4)
    assert (first.gradients, second.gradients) == (4 * MODEL, MODEL)
    assert first.optimizer == second.optimizer == pytest.approx((8 + 4) * MODEL / 4, rel=1e-3)
    assert first.communication == 2 * BUCKET * 2
    assert third.communication == pytest.approx(BUCKET * 2 + 4 * MODEL, rel=1e-3)
    offloaded = memory(full, zero_sharding(2, offload_optimizer=True))
    assert (offloaded.weights, offloaded.gradients, offloaded.optimizer) == (second.weights, 0, 0)


def test_gradients_and_optimizer_state_are_those_of_the_adapter() -> None:
    lora = estimator(AdapterConfig(r=4))
    found = memory(lora, fsdp2_sharding(), 2, bits=4)
    assert found.adapter == found.gradients == 4 * LORA / 2
    assert found.optimizer == pytest.approx(8 * LORA / 2, rel=1e-2)
    packed = 3 * (LAYER - 2 * 64) * 0.516
    assert found.weights == pytest.approx((packed + 4 * (2 * EMBEDDING + 7 * 64)) / 2, rel=2e-3)


@pytest.mark.slow
def test_in_8_bits_layers_without_an_adapter_keep_their_input_too() -> None:
    lora = estimator(AdapterConfig(r=4, target_modules=["down_proj"]))
    plain, int8 = (memory(lora, REPLICATED, 1, bits=bits) for bits in (None, 8))
    assert int8.weights < plain.weights
    assert int8.activations > plain.activations


@pytest.mark.slow
def test_long_rows_of_a_state_space_model_are_extrapolated_from_short_ones() -> None:
    shape = {"model_type": "mamba", "vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    spec = TrainingSpec(from_config=shape, tokenizer_name_or_path="none", dtype="float32")
    found = Estimator(spec, build_skeleton(spec, 100), precision="32-true", max_length=4096, accumulates=False)
    kept = [found.step(tokens, 0, None, has_gradients=True).kept for tokens in (1024, 2048, 4096)]
    assert kept[2] - kept[1] == pytest.approx(2 * (kept[1] - kept[0]))
    assert kept[0] > 0
