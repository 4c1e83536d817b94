"""Runs of the real command in real processes over gloo, and the metrics that they log."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from sft_lightning.__main__ import main

TIMEOUT = 400
"""Seconds after which a run counts as hung; DeepSpeed's CPU Adam is compiled at first use, in half of that time."""

MODES: Mapping[str, tuple[str, ...]] = {
    "full": ("--model.optimizer.init_args.lr=1e-3",),
    "lora": ("--model.adapter.r=4", "--model.adapter.dropout=0"),
    "lora_bf16_base": ("--model.adapter.r=4", "--model.adapter.dropout=0", "--model.dtype=bfloat16"),
    "qlora": ("--model.adapter.r=4", "--model.adapter.dropout=0", "--model.quantization.bits=4"),
}
"""Name of a mode of training → its options."""


def options(model_dir: Path, data: Path) -> list[str]:
    return [
        f"--model.model_name_or_path={model_dir}",
        "--model.dtype=float32",
        f"--data.sources={{toy: {{path: {data}, format: alpaca}}}}",
        "--data.template=alpaca",
        "--data.max_length=256",
        "--data.packing=none",
        "--data.val_fraction=0.2",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        "--trainer.logger.name=",
        "--trainer.logger.version=",
    ]


class Runs:
    """Starts runs of one model on one data file."""

    def __init__(self, model_dir: Path, data: Path, few_samples: list[str]) -> None:
        self._options = [*options(model_dir, data), *few_samples]

    def command(
        self, folder: Path, mode: str, *extra: str, processes: int = 1, strategy: str = "auto", stage: str = "fit"
    ) -> list[str]:
        return [
            *(sys.executable, "-m", "sft_lightning", stage, *self._options, *MODES[mode]),
            f"--trainer.default_root_dir={folder}",
            f"--trainer.logger.save_dir={folder}",
            f"--trainer.devices={processes}",
            f"--trainer.strategy={strategy}",
            f"--trainer.accumulate_grad_batches={4 // processes}",
            *extra,
        ]

    def __call__(self, folder: Path, mode: str, *extra: str, **which: object) -> str:
        """Run to the end and return the output."""
        with subprocess.Popen(
            self.command(folder, mode, *extra, **which),  # type: ignore[arg-type]
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process:  # fmt: skip
            try:
                said, _ = process.communicate(timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the ranks that it started, which hold the pipe
                raise
        assert process.returncode == 0, said[-5000:]
        return said


@pytest.fixture(scope="session")
def runs(model_dir: Path, records_file: Path, few_samples: list[str]) -> Runs:
    return Runs(model_dir, records_file, few_samples)


@pytest.fixture(scope="session")
def alone(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run in one process, this one, made once for each mode."""
    made: dict[str, Path] = {}

    def run(mode: str) -> Path:
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp(f"alone_{mode}")
            assert main(runs.command(made[mode], mode)[3:]) == 0  # without: python -m sft_lightning
        return made[mode]

    return run


@pytest.fixture(scope="session")
def records_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of `alpaca_file`, for the whole session."""
    file = tmp_path_factory.mktemp("data") / "alpaca.json"
    records = [
        {"instruction": f"What is {i} and {i}?", "input": "", "output": f"{i} and {i} is {2 * i}" + "." * (i % 7 + 1)}
        for i in range(24)
    ]
    file.write_text(json.dumps(records))
    return file


@pytest.fixture(scope="session")
def logged() -> Callable[[Path, str], list[float]]:
    """Reads a column of a run's metrics."""

    def column(folder: Path, name: str) -> list[float]:
        with (folder / "metrics.csv").open() as file:
            return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]

    return column
