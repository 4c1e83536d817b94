"""Operations per token and seconds, by the formulas of the papers."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import LlamaConfig

from sft_lightning.estimation.speed import arithmetic, mean_document_length, peak_tflops


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


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("TITAN V", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_cuda_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak
