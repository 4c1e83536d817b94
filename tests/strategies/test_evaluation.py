"""Covers sft_lightning.strategies.fsdp2.strategy, sft_lightning.strategies.zero.strategy and
sft_lightning.models.generation.lockstep.

Evaluation and generation in two real processes over gloo give the results of one process.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sft_lightning.__main__ import main

needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs the deepspeed extra")
DECODING = {
    "sampling": "{max_new_tokens: 8, temperature: 1.0}",
    "beam": "{max_new_tokens: 8, num_beams: 3}",
    "contrastive": "{max_new_tokens: 8, penalty_alpha: 0.6, top_k: 3}",
    "diverse_beam": "{max_new_tokens: 8, num_beams: 4, num_beam_groups: 2}",
}


def cell(strategy: str, *values: str) -> Any:
    marks = [pytest.mark.slow] + [needs_deepspeed] * strategy.startswith("deepspeed")
    return pytest.param(strategy, *values, marks=marks)


@pytest.fixture(scope="session")
def part_of(records_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Writes a file of the first records."""

    def write(number: int) -> Path:
        file = tmp_path_factory.mktemp("part") / f"first_{number}.json"
        file.write_text(json.dumps(json.loads(records_file.read_text())[:number]))
        return file

    return write


def asking(file: Path, decoding: str) -> list[str]:
    """Return options that answer the prompts of a file in batches of two."""
    source = f"--data.predict_sources={{asked: {{path: {file}, format: alpaca}}}}"
    return [source, "--data.batch_size=2", f"--model.generation={DECODING[decoding]}"]


@pytest.mark.parametrize(
    ("strategy", "mode", "decoding"),
    [
        cell("fsdp2", "lora", "sampling"),
        cell("ddp", "lora", "sampling"),
        cell("fsdp2_offload", "lora", "sampling"),
        cell("deepspeed_stage_1", "lora", "sampling"),
        cell("deepspeed_stage_2", "lora", "sampling"),
        cell("deepspeed_stage_3", "lora", "sampling"),
        cell("deepspeed_stage_3_offload", "lora", "sampling"),
        cell("fsdp2", "full", "beam"),
        cell("fsdp2", "lora", "contrastive"),
        cell("fsdp2", "qlora", "diverse_beam"),
        cell("deepspeed_stage_3", "full", "beam"),
        cell("deepspeed_stage_3", "lora", "contrastive"),
        cell("deepspeed_stage_3", "qlora", "diverse_beam"),
    ],
)
def test_two_processes_predict_what_one_predicts(
    runs: Any, part_of: Callable[[int], Path], tmp_path: Path, strategy: str, mode: str, decoding: str
) -> None:
    """Five prompts in batches of two: the second process has no prompt in the second round."""
    ask = asking(part_of(5), decoding)
    assert main(runs.command(tmp_path / "one", mode, *ask, stage="predict")[3:]) == 0
    runs(tmp_path / "two", mode, *ask, stage="predict", processes=2, strategy=strategy)
    expected = (tmp_path / "one/predictions.jsonl").read_bytes()
    assert len(expected.splitlines()) == 5
    assert (tmp_path / "two/predictions.jsonl").read_bytes() == expected


@pytest.mark.parametrize("strategy", [cell("fsdp2"), cell("deepspeed_stage_3")])
def test_a_process_without_any_prompt_takes_part(
    runs: Any, part_of: Callable[[int], Path], tmp_path: Path, strategy: str
) -> None:
    runs(tmp_path, "full", *asking(part_of(1), "sampling"), stage="predict", processes=2, strategy=strategy)
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_file_without_prompts_is_refused(runs: Any, part_of: Callable[[int], Path], tmp_path: Path) -> None:
    ask = asking(part_of(0), "sampling")
    command = runs.command(tmp_path, "full", *ask, stage="predict", processes=2, strategy="fsdp2")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "first_0.json: the file holds no records" in done.stderr


def status_of(command: list[str]) -> int:
    """Run to the end and return the exit status."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            return process.wait(timeout=240)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # processes that are left


KILLER = """
import os, signal
from lightning.pytorch import Callback

class Killer(Callback):
    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        if trainer.global_rank == 1 and batch_idx == 2:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("strategy", [cell("ddp"), cell("fsdp2"), cell("deepspeed_stage_3")])
def test_a_killed_run_continues_where_each_process_stopped(
    runs: Any, records_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    ask = asking(records_file, "sampling")
    assert main(runs.command(tmp_path / "one", "lora", *ask, stage="predict")[3:]) == 0
    (tmp_path / "killer.py").write_text(KILLER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    two: Any = {"stage": "predict", "processes": 2, "strategy": strategy}
    killed = runs.command(tmp_path / "two", "lora", *ask, "--trainer.callbacks+=killer.Killer", **two)
    assert status_of(killed) != 0
    parts = [tmp_path / "two" / f"predictions.jsonl.partial-{rank}-of-2" for rank in range(2)]
    before = [part.read_bytes().splitlines(keepends=True) for part in parts]
    assert len(before[0]) > 1
    assert len(before[1]) == 1 + 2 * 2  # what they were made with, and two batches
    parts[1].write_bytes(b"".join(before[1][:-1]))  # torn: now the processes go on from different batches
    said = runs(tmp_path / "two", "lora", *ask, **two)
    assert "continuing after" in said
    expected = (tmp_path / "one/predictions.jsonl").read_bytes()
    assert (tmp_path / "two/predictions.jsonl").read_bytes() == expected


@pytest.mark.parametrize(
    ("strategy", "stage"),
    [
        cell("ddp", "test"),
        cell("fsdp2", "validate"),
        cell("fsdp2", "test"),
        cell("fsdp2_offload", "validate"),
        cell("deepspeed_stage_2", "validate"),
        cell("deepspeed_stage_3", "validate"),
        cell("deepspeed_stage_3", "test"),
    ],
)
def test_two_processes_evaluate_as_one_does(
    runs: Any, part_of: Callable[[int], Path], tmp_path: Path, strategy: str, stage: str
) -> None:
    """Five rows of one source and one of another, of which the second process has none."""
    split = {"validate": "val", "test": "test"}[stage]
    sources = ", ".join(
        f"{name}: {{path: {part_of(size)}, format: alpaca}}" for name, size in (("five", 5), ("one", 1))
    )
    what = ["--data.val_fraction=0", f"--data.{split}_sources={{{sources}}}", "--data.batch_size=2"]
    assert main(runs.command(tmp_path / "one", "lora", *what, stage=stage)[3:]) == 0
    runs(tmp_path / "two", "lora", *what, stage=stage, processes=2, strategy=strategy)
    expected = metrics(tmp_path / "one")
    assert {f"{split}/loss/five", f"{split}/perplexity/one", f"{split}/perplexity"} <= expected.keys()
    assert metrics(tmp_path / "two") == pytest.approx(expected, rel=1e-6)


def metrics(folder: Path) -> dict[str, float]:
    with (folder / "metrics.csv").open() as file:
        [row] = csv.DictReader(file)
    return {name: float(value) for name, value in row.items()}


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_exports_of_all_strategies_give_the_same_answers(runs: Any, model_dir: Path, tmp_path: Path, mode: str) -> None:
    strategies = ("ddp", "fsdp2", "deepspeed_stage_2", "deepspeed_stage_3")
    rate = "--model.optimizer.init_args.lr=0.05"
    for strategy in strategies:
        runs(tmp_path / strategy, mode, "--trainer.max_steps=2", rate, processes=2, strategy=strategy)
    option, export = ("adapter", "adapter") if mode == "lora" else ("finetuned", "model")
    models = [f"--{option}={tmp_path / strategy / export}" for strategy in strategies]
    (tmp_path / "asked.jsonl").write_text('{"prompt": "Who are you?", "reference": "4 and 4 is 8"}\n')
    files = [f"--prompts={tmp_path / 'asked.jsonl'}", f"--jsonl={tmp_path / 'answers.jsonl'}"]
    assert main(["compare", f"--baseline={model_dir}", *models, *files, "--max_new_tokens=8", "--device=cpu"]) == 0
    base, *tuned = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert len(tuned) == len(strategies)
    perplexities = [each["reference_perplexity"] for each in tuned]
    assert perplexities == pytest.approx([perplexities[0]] * 4, rel=1e-4)
    assert perplexities[0] != pytest.approx(base["reference_perplexity"], rel=5e-3)
    assert len({each["answer"] for each in tuned}) == 1
