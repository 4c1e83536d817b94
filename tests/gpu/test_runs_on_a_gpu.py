"""Covers sft_lightning.training.checkpoint, sft_lightning.models.export, sft_lightning.merging and callbacks.

Runs on a GPU: they continue, and what they leave is exported and merged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sft_lightning.__main__ import main
from sft_lightning.estimation.devices import peak_tflops

pytestmark = pytest.mark.gpu

Fit = Callable[..., Any]


def assert_same_bits(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same_bits(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for each, its in zip(one, other, strict=True):
            assert_same_bits(each, its)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [[], ["--model.adapter.dropout=0.1"], ["--model.adapter=null"]], ids=str)
def test_a_continued_run_ends_in_the_same_bits(options: list[str], fit: Fit) -> None:
    fixed = ["--trainer.deterministic=warn", "--model.lr_scheduler.name=constant", *options]
    whole = fit("whole", *fixed)
    fit("half", *fixed, "--trainer.max_steps=3")
    halves = fit("half", *fixed, "--trainer.max_steps=6", "--ckpt_path=last")
    one, other = (
        torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")
        for run in (whole, halves)
    )
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same_bits(one[key], other[key])
    assert one["global_step"] == other["global_step"] == 6


@pytest.mark.parametrize("quantization", ["null", "{bits: 4}"])
def test_an_exported_adapter_is_what_was_trained_and_merges(
    quantization: str, fit: Fit, llama: Path, device: str, tmp_path: Path
) -> None:
    run = fit("run", "--model.dtype=float32", f"--model.quantization={quantization}", "--model.adapter.r=4")
    adapter = run.folder / "adapter"
    state = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"]
    exported = load_file(adapter / "adapter_model.safetensors")
    assert len(exported) == len(state)
    assert sum(float(each.abs().sum()) for each in exported.values()) == pytest.approx(
        sum(float(each.abs().sum()) for each in state.values()), rel=1e-6
    )
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).to(device)
    ids = torch.arange(3, 40, device=device)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, str(adapter)).eval()(ids).logits
    merged = tmp_path / "merged"
    assert main(["merge", f"--adapter={adapter}", f"--output_dir={merged}", "--dtype=float32", "--base=original"]) == 0
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).to(device).eval()(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.usefixtures("cuda")
def test_the_share_of_the_peak_and_the_memory_are_logged(fit: Fit) -> None:
    run = fit("run")
    assert run.column("memory/peak_gib")[-1] > 0
    assert all(speed > 0 for speed in run.column("throughput/tokens_per_second"))
    if peak_tflops(torch.cuda.get_device_name()) is not None:
        assert all(0 < share < 1 for share in run.column("throughput/mfu"))
