"""Covers benchmarks.gpu.trace.kernels and benchmarks.gpu.trace.layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu.trace import kernels as module
from benchmarks.gpu.trace.kernels import Kernel
from benchmarks.gpu.trace.layer import VARIANTS, Figures, Variant, trace


def test_a_kernel_takes_as_long_as_its_arithmetic_or_its_bytes() -> None:
    assert Kernel("matmul", 700e12, 1.0).seconds == pytest.approx(1.0)
    assert Kernel("matmul", 1.0, 0.85 * 4.3e12).seconds == pytest.approx(1.0)
    assert Kernel("float32 matmul", 50e12, 1.0).seconds == pytest.approx(1.0)
    assert Kernel("memory", 0.0, 2 * 0.85 * 4.3e12).seconds == pytest.approx(2.0)


def assert_at_most(found: Figures, *, kernels: int, saved_mb: float, moved_mb: float) -> None:
    """What a change must not let grow back."""
    assert found.float32_matmuls == 0
    assert found.kernels <= kernels
    assert found.saved_mb <= saved_mb
    assert found.moved_mb <= moved_mb


def test_an_eager_lora_layer_has_no_float32_products_and_saves_each_input_once() -> None:
    found = trace(VARIANTS["LoRA, bf16-mixed"])
    assert found.products == 7 * (2 + 2 * 3)  # base: forward, backward; A and B: forward, and two gradients each
    assert_at_most(found, kernels=198, saved_mb=5.5, moved_mb=1.95)
    assert found.tokens_per_second >= 16_000


def test_pefts_own_forward_computes_in_float32_which_the_trace_sees() -> None:
    found = trace(VARIANTS["LoRA, PEFT's forward"])
    assert found.float32_matmuls == 42
    assert found.saved_mb > 8


def test_the_attention_of_a_gpu_is_traced_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[str] = []
    attention = module.attention_kernel

    def note(name: str, *facts: Any) -> Kernel:
        kinds.append(name)
        return attention(name, *facts)

    monkeypatch.setattr(module, "attention_kernel", note)
    trace(Variant(adapter=False), tokens=1024)
    assert kinds == ["attention", "attention_backward"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LoRA, compiled", "LoRA, bf16-mixed, compiled"])
def test_a_compiled_lora_layer_reaches_the_predicted_goal(name: str) -> None:
    found = trace(VARIANTS[name])
    assert found.products == 56
    assert_at_most(found, kernels=109, saved_mb=4.3, moved_mb=0.9)
    assert found.tokens_per_second >= 19_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kernels", "saved_mb", "moved_mb"),
    [("full, bfloat16, compiled", 39, 4.3, 0.6), ("full, float32 with bf16-mixed, compiled", 55, 5.4, 0.9)],
)
def test_a_compiled_layer_of_full_fine_tuning_stays_as_it_is(
    name: str, kernels: int, saved_mb: float, moved_mb: float
) -> None:
    assert_at_most(trace(VARIANTS[name]), kernels=kernels, saved_mb=saved_mb, moved_mb=moved_mb)


@pytest.fixture(autouse=True)
def _nothing_stays_compiled() -> None:
    torch.compiler.reset()
