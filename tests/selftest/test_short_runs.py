from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sft_lightning.checks import CheckError
from sft_lightning.selftest.short_runs import Run, Runner


def finished_run(dtype: torch.dtype, precision: str, quantization: Any = None) -> Run:
    model = torch.nn.Linear(2, 2, dtype=dtype)
    module: Any = SimpleNamespace(
        language_model=model, spec=SimpleNamespace(quantization=quantization, dtype="float32")
    )
    return Run(module, SimpleNamespace(), SimpleNamespace(precision=precision))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "precision", "coarsest"),
    [
        (torch.float32, "32-true", torch.float32),
        (torch.float32, "bf16-mixed", torch.bfloat16),
        (torch.float32, "16-mixed", torch.float16),
        (torch.bfloat16, "32-true", torch.bfloat16),
    ],
)
def test_rounding_is_that_of_the_coarsest_type(dtype: torch.dtype, precision: str, coarsest: torch.dtype) -> None:
    assert finished_run(dtype, precision).rounding == torch.finfo(coarsest).eps


def test_a_quantized_base_counts_with_the_type_that_it_computes_in() -> None:
    quantization = SimpleNamespace(compute_dtype="bfloat16")
    assert finished_run(torch.float32, "32-true", quantization).rounding == torch.finfo(torch.bfloat16).eps


class FakeTrainer:
    """Records what it was asked to fit, and says that it has taken some steps."""

    def __init__(self, steps: int = 4) -> None:
        self.global_step = steps
        self.callbacks: list[Any] = []
        self.fitted: dict[str, Any] = {}

    def fit(self, module: Any, **options: Any) -> None:
        self.fitted = {"module": module, **options}
        torch.use_deterministic_algorithms(True)


def test_a_short_run_sets_its_own_trainer_keys_and_restores_torchs_settings(tmp_path: Path) -> None:
    given: list[str] = []
    trainer, configured = FakeTrainer(), object()

    def configure(options: Sequence[str]) -> Any:
        given.extend(options)
        return SimpleNamespace(module=configured, instantiate_trainer=lambda: trainer)

    data: Any = object()
    run = Runner(configure, tmp_path).fit(
        data, max_steps=4, accumulate=2, trainer={"gradient_clip_val": None}, ckpt_path=tmp_path / "a.ckpt"
    )
    assert run.module is configured
    assert trainer.fitted == {"module": configured, "datamodule": data, "ckpt_path": str(tmp_path / "a.ckpt")}
    wanted = {
        "max_steps=4",
        "max_epochs=4",
        "accumulate_grad_batches=2",
        "gradient_clip_val=null",
        "devices=1",
        "strategy=auto",
    }
    assert {f"--trainer.{option}" for option in wanted} <= set(given)
    assert f"--trainer.default_root_dir={tmp_path / 'run'}" in given
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_whose_epochs_have_no_step_ends_with_an_error(tmp_path: Path) -> None:
    configuration: Any = SimpleNamespace(module=object(), instantiate_trainer=lambda: FakeTrainer(steps=0))
    data: Any = object()
    with pytest.raises(CheckError, match="0 of 4 optimizer steps in 4 epochs"):
        Runner(lambda options: configuration, tmp_path).fit(data, max_steps=4, accumulate=2)
