"""Covers callbacks.run_outputs, callbacks.run_summary and callbacks.throughput: what a run gives to its loggers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning_utilities.core.imports import RequirementCache
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sft_lightning.__main__ import main

SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
}
TAGS = {"train/loss", "train/lr", "train/grad_norm", "throughput/tokens_per_second", "val/loss", "val/loss/toy",
        "val/perplexity", "val/perplexity/toy"}  # fmt: skip
EVERY_TAG = TAGS | {"throughput/supervised_fraction", "val/token_accuracy"}


def text(events: EventAccumulator, tag: str) -> str:
    [event] = events.Tensors(f"{tag}/text_summary")
    assert event.step == 0
    return bytes(event.tensor_proto.string_val[0]).decode()


@pytest.mark.parametrize("family", SMALL)
def test_every_family_logs_its_first_step(family: str, fit: Callable[..., Path], model_dir: Path) -> None:
    config = json.dumps({"model_type": family, "vocab_size": 320, **SMALL[family]})
    run = fit(
        *("--model.model_name_or_path=null", f"--model.tokenizer_name_or_path={model_dir}"),
        *(f"--model.from_config={config}", "--model.adapter=null"),
        *("--data.packing=none", "--data.val_fraction=0.2", "--trainer.callbacks+=callbacks.EvaluateFirst"),
        *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=50"),
        "--trainer.enable_checkpointing=false",
    )
    events = EventAccumulator(str(next(run.glob("events*")))).Reload()
    assert set(events.Tags()["scalars"]) >= TAGS
    assert [event.step for event in events.Scalars("train/loss")] == [0]
    assert [event.step for event in events.Scalars("val/loss")] == [0, 1]  # before and after steps 0 and 1


def test_configuration_report_and_an_example_are_texts(
    fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit("--trainer.max_steps=1")
    events = EventAccumulator(str(next(run.glob("events*")))).Reload()
    assert f"```yaml\n{(run / 'config.yaml').read_text()}" in text(events, "run/config")
    assert (run / "data_report.json").read_text().strip() in text(events, "run/data_report")
    example = text(events, "run/example")
    assert example.count("⟦") == example.count("⟧") > 0
    answer = example.partition("⟦")[2].partition("⟧")[0]
    assert " is " in answer
    assert "</s>" in answer
    assert "### Response:" not in answer
    shown = capsys.readouterr().out
    assert f"⟦{answer}⟧" in shown
    assert " supervised; supervised text is" in shown


def test_a_csv_logger_gets_numbers_and_the_configuration(fit: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit("--trainer.max_steps=2", "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={folder}", "--trainer.logger.name=", "--trainer.logger.version=")  # fmt: skip
    with (folder / "metrics.csv").open() as file:
        losses = [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 2
    kept = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert kept["model"]["adapter"]["r"] == 4


def test_a_logger_whose_package_is_missing_is_an_error_of_the_user(
    fit_args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", RequirementCache("wandb>=999"))
    assert main(["fit", *fit_args, "--trainer.logger=lightning.pytorch.loggers.WandbLogger"]) == 2
    error = capsys.readouterr().err
    assert "WandbLogger: needs wandb>=999, which is not installed; run pip install 'sft-lightning[wandb]'" in error


@pytest.mark.slow
def test_weights_and_biases_offline_gets_numbers_and_texts(
    fit: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    seen: set[str] = set()
    log = WandbLogger.log_metrics

    def watch(self: WandbLogger, metrics: dict[str, Any], step: int | None = None) -> None:
        seen.update(metrics)
        log(self, metrics, step)

    monkeypatch.setattr(WandbLogger, "log_metrics", watch)
    fit("--trainer.max_steps=1", "--trainer.logger=lightning.pytorch.loggers.WandbLogger",
        "--trainer.logger.offline=true", f"--trainer.logger.save_dir={tmp_path / 'run'}")  # fmt: skip
    assert {"train/loss", "run/config", "run/example", "run/data_report", "samples/0"} <= seen
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_tensorboard_has_every_promised_tag_for_every_step(fit: Callable[..., Path]) -> None:
    run = fit("--data.val_fraction=0.2", "--trainer.accumulate_grad_batches=2")
    events = EventAccumulator(str(next(run.glob("events*")))).Reload()
    assert set(events.Tags()["scalars"]) >= EVERY_TAG
    steps = json.loads((run / "data_report.json").read_text())["optimizer_steps"]
    assert [event.step for event in events.Scalars("train/loss")] == list(range(steps))
    assert all(event.value > 0 for event in events.Scalars("throughput/tokens_per_second"))
    shares = [event.value for event in events.Scalars("throughput/supervised_fraction")]
    assert all(0 < share < 1 for share in shares)
