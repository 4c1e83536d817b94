"""A simulated step against the peak of the CPU's allocator in a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from sft_lightning.models.adapters import AdapterConfig, add_adapter
from sft_lightning.models.attention import PACKED
from sft_lightning.models.generation import base_model
from sft_lightning.planning.simulation import simulate_step, training_step
from sft_lightning.planning.skeleton import build_skeleton
from sft_lightning.training.module import CausalLMModule

SHAPES: dict[str, dict[str, Any]] = {
    "narrow": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 6, "num_attention_heads": 4},
    "grouped": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_key_value_heads": 2,
                "num_attention_heads": 8},
    "wide": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
}  # fmt: skip


def shape(name: str) -> dict[str, Any]:
    return {"model_type": "llama", "vocab_size": 2000, "max_position_embeddings": 1024, **SHAPES[name]}


def module(name: str, adapter: AdapterConfig | None) -> CausalLMModule:
    return CausalLMModule(from_config=shape(name), tokenizer_name_or_path="none", dtype="float32", adapter=adapter)


def real_peak(name: str, adapter: AdapterConfig | None, rows: int, length: int, checkpointing: bool) -> int:
    """Bytes that the allocator had out at once in a step, beside what was there before it."""
    values = {key: value for key, value in shape(name).items() if key != "model_type"}
    base = AutoModelForCausalLM.from_config(LlamaConfig(**values), attn_implementation=PACKED).train()
    model: Any = base if adapter is None else add_adapter(base, adapter)
    if checkpointing:
        base_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        training_step(model, base_model(model), rows, length, torch.autocast("cpu", enabled=False))
    kineto: Any = profiled.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [AdapterConfig(r=8), None], ids=["lora", "full"])
@pytest.mark.parametrize("name", list(SHAPES))
def test_a_simulated_step_takes_what_a_real_one_takes(
    name: str, adapter: AdapterConfig | None, checkpointing: bool
) -> None:
    skeleton = build_skeleton(module(name, adapter), 2000)
    simulated = simulate_step(skeleton, batch_size=2, max_length=256, gradient_checkpointing=checkpointing)
    real = real_peak(name, adapter, 2, 256, checkpointing)
    print(f"{name} {adapter is None} {checkpointing}: {simulated.peak / real - 1:+.2%} of {real / 2**20:.1f} MiB")
    assert simulated.peak == pytest.approx(real, rel=0.05)
