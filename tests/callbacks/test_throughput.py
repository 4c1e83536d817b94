from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from callbacks import Throughput
from sft_lightning.estimation.speed import num_matrix_entries, peak_tflops
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362.0),
        ("Some GPU A1000", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(device: str, peak: float | None) -> None:
    assert peak_tflops(device) == peak


def test_matrices_are_counted_with_the_head_and_without_adapters() -> None:
    llama = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(llama)
    expected = 2 * (4 * 16 * 16 + 3 * 16 * 32) + 50 * 16
    assert num_matrix_entries(model) == expected
    add_adapter(model, AdapterConfig(r=4))
    assert num_matrix_entries(model) == expected
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
    assert num_matrix_entries(gpt2) == 2 * (4 + 8) * 16 * 16 + 50 * 16


def test_mfu_is_speed_times_operations_over_the_peak(fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    start = Throughput.on_train_start

    def as_on_a_gpu(self: Throughput, trainer: Any, module: Any) -> None:
        start(self, trainer, module)
        self._flops_per_second, self._flops_per_token = 1e12, 3e9

    monkeypatch.setattr(Throughput, "on_train_start", as_on_a_gpu)
    run = fit("--trainer.max_steps=2", "--trainer.enable_checkpointing=false")
    events = EventAccumulator(str(next(run.glob("events*")))).Reload()
    speeds = [event.value for event in events.Scalars("throughput/tokens_per_second")]
    shares = [event.value for event in events.Scalars("throughput/mfu")]
    assert shares == pytest.approx([speed * 3e9 / 1e12 for speed in speeds], rel=1e-5)
