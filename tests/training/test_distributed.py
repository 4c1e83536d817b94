"""Covers sft_lightning.training.module and sft_lightning.data.batches.loader over several processes.

Real processes over gloo: the losses do not depend on their number, and a run can be continued with another number.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft_lightning.__main__ import main

TIMEOUT = 120
"""Seconds after which a run hangs."""


def command(
    fit_args: list[str], folder: Path, *, processes: int, accumulate: int, extra: tuple[str, ...] = ()
) -> list[str]:
    return [
        *(sys.executable, "-m", "sft_lightning", "fit", *fit_args),
        f"--trainer.default_root_dir={folder}",
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={folder}",
        "--trainer.logger.name=",
        "--trainer.logger.version=",
        "--trainer.accelerator=cpu",
        f"--trainer.devices={processes}",
        f"--trainer.strategy={'ddp' if processes > 1 else 'auto'}",
        f"--trainer.accumulate_grad_batches={accumulate}",
        "--trainer.enable_progress_bar=false",
        "--model.adapter.dropout=0",
        "--data.packing=none",
        "--data.val_fraction=0.2",
        *extra,
    ]


def run_alone(*args: object, **options: object) -> None:
    """Run in this process, which has imported everything."""
    assert main(command(*args, processes=1, **options)[3:]) == 0  # type: ignore[arg-type] # without: python -m …


def run(*args: object, **options: object) -> str:
    done = subprocess.run(
        command(*args, **options),  # type: ignore[arg-type]
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def column(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_two_processes_learn_the_same_as_one(fit_args: list[str], tmp_path: Path) -> None:
    # 19 rows in steps of 4: the last step has 3, so that one rank has nothing in its last micro-batch.
    run_alone(fit_args, tmp_path / "one", accumulate=4)
    said = run(fit_args, tmp_path / "two", processes=2, accumulate=2)
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert column(tmp_path / "two", name) == pytest.approx(column(tmp_path / "one", name), rel=1e-6)
    assert said.count("optimizer steps per epoch") == 1  # only rank 0 reports
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_run_of_one_process_continues_on_two_with_the_same_rows(fit_args: list[str], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    every = ("--trainer.max_epochs=2",)
    run(fit_args, whole, processes=1, accumulate=4, extra=every)
    checkpoints = (
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps=3",
        "--trainer.callbacks.save_top_k=-1",
        "--trainer.callbacks.filename={step}",
    )
    run(fit_args, parts, processes=1, accumulate=4, extra=(*every, *checkpoints))
    [checkpoint] = parts.glob("checkpoints/step=3.ckpt")
    again = tmp_path / "again"
    run(fit_args, again, processes=2, accumulate=2, extra=(*every, f"--ckpt_path={checkpoint}"))
    assert column(again, "train/loss") == pytest.approx(column(whole, "train/loss")[3:], rel=1e-5)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_whole_run(fit_args: list[str], tmp_path: Path) -> None:
    args = command(fit_args, tmp_path / "run", processes=2, accumulate=1, extra=("--trainer.max_epochs=10000",))
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            metrics = tmp_path / "run" / "metrics.csv"
            _wait_for(metrics.is_file)
            [child] = _children(process.pid)
            os.kill(child, signal.SIGKILL)
            assert process.wait(timeout=60) != 0
        finally:
            process.kill()


def _wait_for(condition, seconds: float = TIMEOUT) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
