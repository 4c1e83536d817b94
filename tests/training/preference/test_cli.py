"""Covers sft_lightning.cli.app and sft_lightning.training.preference: `task: dpo` on the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sft_lightning.__main__ import main


@pytest.fixture
def dpo_args(model_dir: Path, tmp_path: Path) -> list[str]:
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad" * (i % 3 + 1)} for i in range(12)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    return [
        "--task=dpo",
        f"--model.model_name_or_path={model_dir}",
        "--model.dtype=float32",
        f"--data.sources={{toy: {{path: {tmp_path / 'pairs.json'}}}}}",
        "--data.template=alpaca",
        "--data.max_length=400",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        "--trainer.log_every_n_steps=1",
        "--trainer.max_steps=2",
        "--trainer.accelerator=cpu",
    ]


@pytest.mark.end_to_end
def test_a_preference_run_exports_its_adapter_and_logs_rewards(dpo_args: list[str], tmp_path: Path) -> None:
    assert main(["fit", *dpo_args, "--model.adapter.r=4", "--model.preference.beta=0.2"]) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "run" / "samples.jsonl").exists()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert {"train/loss", "train/rewards/accuracy", "train/log_probs/chosen"} <= set(events.Tags()["scalars"])
    assert abs(events.Scalars("train/loss")[0].value - math.log(2)) <= 1e-6
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["task"] == "dpo"
    assert config["model"]["preference"]["beta"] == 0.2


def test_a_config_file_can_name_the_task(dpo_args: list[str], tmp_path: Path) -> None:
    file = tmp_path / "dpo.yaml"
    file.write_text(yaml.safe_dump({"task": "dpo", "model": {"preference": {"loss": "simpo", "beta": 2.0}}}))
    assert main(["fit", "--config", str(file), *dpo_args[1:], "--trainer.max_steps=1"]) == 0
    assert (tmp_path / "run" / "model").exists()


def test_keys_of_preference_training_are_refused_for_other_tasks(
    dpo_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *dpo_args[1:], "--model.preference.beta=0.2"]) == 2
    assert "model.preference.beta: no such key" in capsys.readouterr().err
