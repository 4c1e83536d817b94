from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.pytorch import LightningModule, Trainer

from callbacks import CheckSummary, DataSummary
from sft_lightning.checks import Check
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.report import DataReport, SourceReport
from sft_lightning.data.spec import DataSpec
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.spec import TrainingSpec

MODULE = cast(LightningModule, None)  # unused


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    data = SFTDataModule(DataSpec())
    source = SourceReport("train", "alpaca", records=3, examples=2, tokens=20, supervised_tokens=10)
    source.dropped["overlong"], source.dropped_at["overlong"] = 1, ["data/[x].json, record 1"]
    data.report = DataReport({"train/toy": source}, max_length=10, rows=2, optimizer_steps=1, fill=1.0)
    state = SimpleNamespace(fn="validate")
    return SimpleNamespace(datamodule=data, logger=None, default_root_dir=str(tmp_path / "run"), state=state)


def read(trainer: Any) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((Path(trainer.default_root_dir) / "data_report.json").read_text("utf-8"))
    return report


def test_the_report_is_shown_and_written(trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    DataSummary().on_validation_start(cast(Trainer, trainer), MODULE)
    shown = capsys.readouterr().out
    assert "train/toy" in shown
    assert "data/[x].json, record 1" in shown
    assert "2 rows of 10 tokens, 100.0% full; 1 optimizer steps per epoch" in shown
    assert read(trainer)["sources"]["train/toy"]["dropped"] == {"overlong": 1}


def test_a_validation_during_fit_does_not_report_again(trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.state.fn = "fit"
    DataSummary().on_validation_start(cast(Trainer, trainer), MODULE)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("hook", ["on_validation_start", "on_test_start"])
def test_validate_and_test_report_too(trainer: Any, hook: str) -> None:
    getattr(DataSummary(), hook)(trainer, MODULE)
    assert read(trainer)["sources"]


def test_a_run_shows_and_writes_its_report(fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = fit("--trainer.max_steps=1")
    shown = capsys.readouterr().out
    assert "train/toy" in shown
    assert "optimizer steps per epoch" in shown
    report = json.loads((run / "data_report.json").read_text())
    assert report["sources"]["train/toy"]["examples"] == 24


def test_checks_are_shown_after_the_first_step_and_at_the_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module = CausalLMModule(TrainingSpec(model_name_or_path="none"))
    run = cast(Trainer, SimpleNamespace(global_step=0, loggers=[], default_root_dir=str(tmp_path)))
    summary = CheckSummary()
    module.checks.note(Check("masks", True, "8 documents"))
    summary.on_train_batch_start(run, module, None, 0)
    assert capsys.readouterr().out == ""
    run.global_step = 1  # type: ignore[misc]
    summary.on_train_batch_start(run, module, None, 1)
    assert "✓ masks" in capsys.readouterr().out
    summary.on_train_batch_start(run, module, None, 2)
    assert capsys.readouterr().out == ""
    module.checks.note(Check("optimizer steps", True, "2 of 2 planned"))
    summary.on_fit_end(run, module)
    shown = capsys.readouterr().out
    assert "checks: 2 of 2 verified" in shown
    assert "✓ optimizer steps" in shown
    assert "✓ masks" not in shown
