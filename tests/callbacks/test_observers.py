from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAGS = {
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "throughput/tokens_per_second",
    "throughput/supervised_fraction",
    "val/loss",
    "val/perplexity",
    "val/token_accuracy",
    "val/loss/toy",
}


def test_tensorboard_has_every_promised_tag_for_every_step(fit: Callable[..., Path]) -> None:
    run = fit("--data.val_fraction=0.2", "--trainer.accumulate_grad_batches=2")
    events = EventAccumulator(str(next(run.glob("events*")))).Reload()
    assert set(events.Tags()["scalars"]) >= TAGS
    steps = json.loads((run / "data_report.json").read_text())["optimizer_steps"]
    assert [event.step for event in events.Scalars("train/loss")] == list(range(steps))
    assert all(event.value > 0 for event in events.Scalars("throughput/tokens_per_second"))
    shares = [event.value for event in events.Scalars("throughput/supervised_fraction")]
    assert all(0 < share < 1 for share in shares)


def test_the_data_report_is_shown_and_written(fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = fit("--trainer.max_steps=1")
    shown = capsys.readouterr().out
    assert "train/toy" in shown
    assert "optimizer steps per epoch" in shown
    report = json.loads((run / "data_report.json").read_text())
    assert report["sources"]["train/toy"]["examples"] == 24


def test_output_that_is_no_terminal_gets_lines_not_a_bar(
    fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fit("--data.val_fraction=0.2")
    captured = capsys.readouterr()
    assert "\r" not in captured.out + captured.err
    [line] = [line for line in captured.out.splitlines() if line.startswith("trained ")]
    assert "loss" in line
    assert "tokens/s" in line
