from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from sft_lightning.__main__ import main

NO_SAMPLES = "--trainer.callbacks+={class_path: callbacks.SampleGeneration, init_args: {prompts: []}}"
"""Generating answers takes longer than training here."""


def test_a_finished_run_is_not_overwritten(fit_args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *fit_args, NO_SAMPLES, "--trainer.max_steps=1"]) == 0
    assert main(["fit", *fit_args, NO_SAMPLES, "--trainer.max_steps=1"]) == 2
    assert "--ckpt_path last" in capsys.readouterr().err


@pytest.mark.end_to_end
def test_a_run_leaves_every_promised_output(fit_args: list[str], tmp_path: Path) -> None:
    assert main(["fit", *fit_args, "--trainer.max_steps=2", "--data.val_fraction=0.2"]) == 0
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "data_report.json", "samples.jsonl", "checkpoints", "adapter"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    report = json.loads((run / "data_report.json").read_text())
    assert report["sources"]["train/toy"]["records"] + report["sources"]["val/toy"]["records"] == 24
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["template"] == "alpaca"


@pytest.mark.end_to_end
def test_validate_test_and_predict_run_from_a_checkpoint(
    fit_args: list[str], alpaca_file: Path, tmp_path: Path
) -> None:
    data = ["--data.val_fraction=0.2", f"--data.test_sources={{held: {{path: {alpaca_file}}}}}"]
    assert main(["fit", *fit_args, *data, NO_SAMPLES, "--trainer.max_steps=2"]) == 0
    checkpoint = f"--ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"
    for command in ("validate", "test", "predict"):
        assert main([command, *fit_args, *data, checkpoint, "--model.generation.max_new_tokens=4"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert {"prompt", "reference", "answer", "source", "location"} <= rows[0].keys()


@pytest.mark.end_to_end
def test_max_steps_alone_runs_over_as_many_epochs_as_it_takes(fit_args: list[str], tmp_path: Path) -> None:
    assert main(["fit", *fit_args, NO_SAMPLES, "--trainer.max_steps=5", "--trainer.accumulate_grad_batches=4"]) == 0
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert json.loads((tmp_path / "run" / "adapter" / "run_manifest.json").read_text())["optimizer_steps"] == 5


def test_a_runs_own_config_continues_it(fit_args: list[str], tmp_path: Path) -> None:
    assert main(["fit", *fit_args, NO_SAMPLES, "--trainer.max_epochs=1"]) == 0
    config = tmp_path / "config.yaml"
    config.write_text((tmp_path / "run" / "config.yaml").read_text())
    assert main(["fit", f"--config={config}", "--ckpt_path=last", "--trainer.max_epochs=2"]) == 0
    assert json.loads((tmp_path / "run" / "adapter" / "run_manifest.json").read_text())["epoch"] == 2


def test_ckpt_path_last_in_a_new_folder_starts_from_the_beginning_and_says_so(
    fit_args: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["fit", *fit_args, NO_SAMPLES, "--trainer.max_steps=1", "--ckpt_path=last"]) == 0
    assert f"--ckpt_path last: {tmp_path / 'run' / 'checkpoints'} has no checkpoint yet" in caplog.text


def test_ckpt_path_last_without_a_checkpoint_overwrites_nothing(
    fit_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").touch()
    assert main(["fit", *fit_args, "--ckpt_path=last"]) == 2
    assert "earlier run" in capsys.readouterr().err
