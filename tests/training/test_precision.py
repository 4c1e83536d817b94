"""Covers sft_lightning.training.module, sft_lightning.training.optim and sft_lightning.cli.trainer: half precision.

What runs on the CPU, and what is refused with a reason.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sft_lightning.__main__ import main
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.quantization import load_quantized
from sft_lightning.training.module import CausalLMModule

NO_SAMPLES = "--trainer.callbacks+={class_path: callbacks.SampleGeneration, init_args: {prompts: []}}"


def options(fit_args: list[str], *more: str) -> list[str]:
    args = [arg for arg in fit_args if "model.adapter" not in arg and "model.dtype" not in arg]
    return ["fit", *args, "--trainer.accelerator=cpu", "--trainer.max_steps=2", NO_SAMPLES, *more]


@pytest.mark.parametrize(
    ("dtype", "precision", "adapter"),
    [
        ("float32", "bf16-mixed", False),
        ("bfloat16", "bf16-true", False),
        ("bfloat16", "32-true", True),
        ("float16", "32-true", True),
    ],
)
def test_a_run_in_half_precision_learns(
    dtype: str, precision: str, adapter: bool, fit_args: list[str], tmp_path: Path
) -> None:
    more = ["--model.adapter.r=4"] if adapter else []
    assert main([*options(fit_args, *more), f"--model.dtype={dtype}", f"--trainer.precision={precision}"]) == 0
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert {tensor.dtype for tensor in state.values()} == {
        torch.bfloat16 if precision == "bf16-true" else torch.float32
    }


SCALER = """--trainer.plugins={class_path: lightning.pytorch.plugins.MixedPrecision, init_args: {precision: 16-mixed,
    device: cpu, scaler: {class_path: torch.amp.GradScaler, init_args: {device: cpu, init_scale: 1024.0}}}}"""
"""What Lightning makes of `trainer.precision: 16-mixed` on a GPU, with torch's gradient scaler for the CPU."""


def test_a_fused_optimizer_takes_scaled_losses_and_clips_unscaled_ones(fit_args: list[str], tmp_path: Path) -> None:
    weights, norms = {}, {}
    for fused in (False, True):
        run = tmp_path / str(fused)
        more = ["--model.dtype=float32", f"--trainer.default_root_dir={run}", "--trainer.gradient_clip_val=0.1"]
        more += [f"--model.optimizer.init_args.fused={str(fused).lower()}", "--model.gradient_checkpointing=false"]
        assert main([*options(fit_args, *more), SCALER]) == 0
        weights[fused] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        events = EventAccumulator(str(run))
        events.Reload()
        norms[fused] = [event.value for event in events.Scalars("train/grad_norm")]
        assert [event.value for event in events.Scalars("train/loss_scale")] == [1024.0, 1024.0]
    assert norms[True] == pytest.approx(norms[False], rel=1e-3)
    assert max(norms[True]) < 100, "unscaled"
    for name, tensor in weights[True].items():
        torch.testing.assert_close(tensor, weights[False][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "precision", "adapter", "message"),
    [
        ("float32", "16-mixed", False, "trainer.precision: 16-mixed scales the loss for float16, which requires a GPU"),
        ("float16", "32-true", False, "float16 weights train without a scaled loss and would become NaN"),
        ("float16", "16-true", False, "float16 weights train without a scaled loss and would become NaN"),
        ("float16", "16-true", True, "float16 weights train without a scaled loss and would become NaN"),
    ],
)
def test_float16_that_cannot_be_trained_here_is_refused(
    dtype: str, precision: str, adapter: bool, message: str, fit_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if precision == "16-mixed" and torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    more = ["--model.adapter.r=4"] if adapter else []
    assert main([*options(fit_args, *more), f"--model.dtype={dtype}", f"--trainer.precision={precision}"]) == 2
    assert message in capsys.readouterr().err


def decoded(model: torch.nn.Module) -> torch.Tensor:
    """Return the first 4-bit weight, decoded."""
    layer = next(module for module in model.modules() if isinstance(module, Linear4bit))
    weight: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


def test_4_bit_weights_that_are_stored_as_another_type_survive_the_trainers_cast(
    fit_args: list[str], model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(CausalLMModule, "on_fit_start", lambda self: seen.append(decoded(self.base_model)))
    four = ["--model.adapter.r=4", "--model.quantization.bits=4", "--model.dtype=float32"]
    assert main([*options(fit_args, *four), "--trainer.precision=bf16-true"]) == 0
    loaded = load_quantized(str(model_dir), QuantizationConfig(bits=4), dtype=torch.float32)
    torch.testing.assert_close(seen[0].float(), decoded(loaded).float())
