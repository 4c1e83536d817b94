"""Memory of a simulated step, against the peak of the CPU's allocator in a real step."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import bitsandbytes.optim as bnb
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.models.base.config import DTypeName, QuantizationConfig
from sft_lightning.models.base.quantization import load_quantized
from sft_lightning.models.checkpointing import Recomputation, enable_gradient_checkpointing
from sft_lightning.models.inspection import base_model
from sft_lightning.models.spec import ModelSpec
from sft_lightning.training.memory.simulation import fake_optimizer, optimizer_bytes, simulate_step, training_step
from sft_lightning.training.memory.skeleton import build_skeleton

SHAPES: dict[str, dict[str, Any]] = {
    "narrow": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 6, "num_attention_heads": 4},
    "grouped": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_key_value_heads": 2,
                "num_attention_heads": 8},
    "wide": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
}  # fmt: skip


def shape(name: str) -> dict[str, Any]:
    return {"model_type": "llama", "vocab_size": 2000, "max_position_embeddings": 1024, **SHAPES[name]}


def spec(name: str, adapter: AdapterConfig | None, dtype: DTypeName = "float32") -> ModelSpec:
    return ModelSpec(from_config=shape(name), tokenizer_name_or_path="none", dtype=dtype, adapter=adapter)


def real_peak(name: str, adapter: AdapterConfig | None, rows: int, length: int, how: Recomputation) -> int:
    """Largest number of bytes that the allocator had out in a step, without those from before it."""
    values = {key: value for key, value in shape(name).items() if key != "model_type"}
    base = AutoModelForCausalLM.from_config(LlamaConfig(**values), attn_implementation=PACKED).train()
    return peak_of(base if adapter is None else add_adapter(base, adapter), rows, length, how)


def peak_of(model: Any, rows: int, length: int, how: Recomputation) -> int:
    """Largest number of bytes that the allocator had out in a step of a model, without those from before it."""
    if how:
        enable_gradient_checkpointing(base_model(model), how)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        training_step(model, base_model(model), rows, length, torch.autocast("cpu", enabled=False))
    kineto: Any = profiled.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def int8_model(name: str, folder: Path) -> PreTrainedModel:
    """The model with its linear layers in LLM.int8."""
    values = {key: value for key, value in shape(name).items() if key != "model_type"}
    AutoModelForCausalLM.from_config(LlamaConfig(**values)).save_pretrained(folder)
    return load_quantized(
        str(folder), QuantizationConfig(bits=8), dtype=torch.bfloat16, attn_implementation=PACKED
    ).train()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["grouped", "narrow", "wide"])
def test_a_simulated_8_bit_step_takes_the_memory_of_bitsandbytes_on_the_cpu(
    name: str, checkpointing: bool, tmp_path: Path
) -> None:
    skeleton = build_skeleton(spec(name, AdapterConfig(r=8), "bfloat16"), 2000)
    options: Any = {"batch_size": 2, "max_length": 256, "recomputation": int(checkpointing), "device": "cpu"}
    simulated = simulate_step(skeleton, **options, int8=True)
    plain = simulate_step(skeleton, **options)
    real = peak_of(add_adapter(int8_model(name, tmp_path), AdapterConfig(r=8)), 2, 256, checkpointing)
    print(f"{name} {checkpointing}: {simulated.peak / real - 1:+.2%}, plain {plain.peak / real - 1:+.2%}")
    assert simulated.peak == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("how", [0, 1, "selective"])
@pytest.mark.parametrize("adapter", [AdapterConfig(r=8), None], ids=["lora", "full"])
@pytest.mark.parametrize(
    "name", ["grouped", *(pytest.param(name, marks=pytest.mark.slow) for name in SHAPES if name != "grouped")]
)
def test_a_simulated_step_takes_the_memory_of_a_real_one(
    name: str, adapter: AdapterConfig | None, how: Recomputation
) -> None:
    skeleton = build_skeleton(spec(name, adapter), 2000)
    simulated = simulate_step(skeleton, batch_size=2, max_length=256, recomputation=how, device="cpu")
    real = real_peak(name, adapter, 2, 256, how)
    print(f"{name} {adapter is None} {how}: {simulated.peak / real - 1:+.2%} of {real / 2**20:.1f} MiB")
    assert simulated.peak == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize(
    ("make", "bytes_per_parameter"),
    [(torch.optim.AdamW, 8), (torch.optim.Adagrad, 4), (bnb.AdamW8bit, 2), (torch.optim.LBFGS, None)],
)
def test_an_optimizers_state_is_counted_unless_its_step_reads_values(
    make: Any, bytes_per_parameter: int | None
) -> None:
    skeleton = build_skeleton(spec("wide", None), 2000)
    found = optimizer_bytes(skeleton, fake_optimizer(skeleton, make))
    num_parameters = sum(parameter.numel() for parameter in skeleton.trainable)
    expected = None if bytes_per_parameter is None else pytest.approx(bytes_per_parameter * num_parameters, rel=0.03)
    assert found == expected


def test_an_optimizer_that_refuses_its_arguments_is_refused() -> None:
    skeleton = build_skeleton(spec("narrow", None), 2000)
    with pytest.raises(UserError, match=r"model\.optimizer\.init_args: not accepted by the optimizer: .*momentun"):
        fake_optimizer(skeleton, functools.partial(torch.optim.SGD, momentun=0.9))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_dropout_keeps_a_mask_of_one_byte_on_a_gpu_and_one_of_the_inputs_type_on_the_cpu(device: Any) -> None:
    shape = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 300, "attn_pdrop": 0.0}
    kept = []
    for dropout in (0.0, 0.1):
        values = {**shape, "resid_pdrop": dropout, "embd_pdrop": dropout}
        skeleton = build_skeleton(ModelSpec(from_config=values, tokenizer_name_or_path="none", dtype="float32"), 300)
        kept.append(simulate_step(skeleton, batch_size=1, max_length=32, recomputation=0, device=device).kept)
    masks = 3 * 32 * 64  # of the embeddings, attention, and the feed-forward layer
    assert kept[1] - kept[0] == pytest.approx(masks * (1 if device == "cuda" else 4), rel=0.35)
