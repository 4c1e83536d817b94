"""Covers sft_lightning.training.module, sft_lightning.models.base.building, sft_lightning.models.compiling on a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu

Fit = Callable[..., Any]

FULL = "--model.adapter=null"
WAYS: dict[str, tuple[float, list[str]]] = {
    "lora, float32": (2e-4, ["--model.dtype=float32", "--trainer.precision=32-true"]),
    "lora, bf16-mixed": (5e-2, []),
    "lora, bf16-true": (5e-2, ["--trainer.precision=bf16-true"]),
    "full, float32": (2e-4, [FULL, "--model.dtype=float32", "--trainer.precision=32-true"]),
    "full, bf16-mixed": (5e-2, [FULL, "--model.dtype=float32"]),
    "full, bf16-true": (5e-2, [FULL, "--trainer.precision=bf16-true"]),
    "qlora, bf16-mixed": (5e-2, ["--model.quantization={bits: 4}"]),
    "int8 lora, bf16-mixed": (5e-2, ["--model.quantization={bits: 8}"]),
}
"""Way of training → how far its losses may be from the CPU's, and its options."""
RATE = "--model.optimizer.init_args.lr=0.002"


@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_learns_with_the_losses_of_the_cpu(way: str, fit: Fit) -> None:
    tolerance, options = WAYS[way]
    ours, reference = fit("gpu", RATE, *options), fit("cpu", RATE, *options, device="cpu")
    assert len(ours.losses) == 6
    assert ours.losses == pytest.approx(reference.losses, abs=tolerance)
    assert ours.losses[-1] < ours.losses[0] - 0.1
    assert all(0 < norm < 100 for norm in ours.norms)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("options", [[FULL, "--model.dtype=float32"], ["--model.dtype=float16"]], ids=["full", "lora"])
def test_float16_with_a_scaled_loss_learns(options: list[str], fit: Fit) -> None:
    half, reference = fit("half", "--trainer.precision=16-mixed", RATE, *options), fit("bf16", RATE, *options[:1])
    assert half.losses[-1] < half.losses[0]
    assert half.losses[0] == pytest.approx(reference.losses[0], abs=5e-2)


@pytest.mark.usefixtures("cuda")
def test_int8_trains_under_16_mixed_as_a_recipe_does(fit: Fit) -> None:
    run = fit("int8", "--model.quantization={bits: 8}", "--model.dtype=float16", "--trainer.precision=16-mixed")
    assert run.losses[-1] < run.losses[0]


@pytest.mark.parametrize("quantization", ["null", "{bits: 4}", "{bits: 8}"])
def test_a_model_without_files_is_drawn_on_the_device_and_learns(quantization: str, fit: Fit, llama: object) -> None:
    shape = {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    options = [
        "--model.model_name_or_path=null", f"--model.from_config={json.dumps(shape)}",
        f"--model.tokenizer_name_or_path={llama}", f"--model.quantization={quantization}",
    ]  # fmt: skip
    run = fit("drawn", *options)
    assert run.losses[-1] < run.losses[0] - 0.1


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_recomputed_layers_have_the_same_losses(adapter: bool, fit: Fit) -> None:
    options = [RATE] if adapter else [RATE, FULL, "--model.dtype=float32"]
    kept = fit("kept", "--model.gradient_checkpointing=false", *options)
    recomputed = fit("recomputed", "--model.gradient_checkpointing=true", *options)
    assert recomputed.losses == pytest.approx(kept.losses, abs=2e-3)


@pytest.mark.parametrize(
    ("way", "checkpointing"), [("lora", "false"), ("lora", "true"), ("full", "true"), ("qlora", "true")]
)
def test_compiled_layers_have_the_losses_of_eager_ones(way: str, checkpointing: str, fit: Fit) -> None:
    options = [RATE, f"--model.gradient_checkpointing={checkpointing}", *WAYS[f"{way}, bf16-mixed"][1]]
    eager = fit("eager", "--model.torch_compile=false", *options)
    torch.compiler.reset()
    compiled = fit("compiled", "--model.torch_compile=true", *options)
    assert compiled.losses == pytest.approx(eager.losses, abs=5e-2)
