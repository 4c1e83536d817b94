"""Run `fit` in several CPU processes, and sample the memory of all of them while it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil

Sample = TypeVar("Sample")
_HERE = Path(__file__).parent


def write_config(
    folder: Path,
    name: str,
    *,
    watch: str,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    trainer: Mapping[str, Any],
) -> Path:
    """Write the configuration of a short pretraining run on the CPU, and return its file.

    Args:
        folder: Folder for the run's files, with the training text in `rows.jsonl`.
        name: Name of the run.
        watch: Class path of the callback that measures; it writes `<rank>.json` into the folder `WATCH_FOLDER`.
        model: Keys under `model`.
        data: Further keys under `data`.
        trainer: Further keys under `trainer`.
    """
    config = {
        "task": "pretrain",
        "model": dict(model),
        "data": {
            "sources": {"rows": {"path": str(folder / "rows.jsonl")}}, "packing": "none",
            "store_dir": str(folder / "stores"), **data,
        },
        "trainer": {
            "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
            "default_root_dir": str(folder / f"run_{name}"),
            "callbacks": [
                {"class_path": watch},
                {"class_path": "callbacks.SampleGeneration", "init_args": {"prompts": []}},
            ],
            **trainer,
        },
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    return file


def fit(
    config: Path, sample: Callable[[psutil.Process], Sample], *, seconds: float, environment: Mapping[str, str] = {}
) -> tuple[list[dict[str, Any]], list[tuple[float, Sample]]]:
    """Run `fit`, and return the answer of each process's watch, and the samples with their times.

    Args:
        config: Of `write_config`.
        sample: Measures the process that was started, with its children.
        seconds: Time between two samples.
        environment: Further environment variables.

    Raises:
        SystemExit: If the run fails; the end of its output is shown.
    """
    answers = config.with_name(f"answers_{config.stem}")
    answers.mkdir(exist_ok=True)
    variables = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WATCH_FOLDER": str(answers),
        "PYTHONPATH": os.pathsep.join([str(_HERE), str(_HERE.parents[1])]), **environment,
    }  # fmt: skip
    samples: list[tuple[float, Sample]] = []
    with (answers / "output.txt").open("w") as output:
        command = [sys.executable, "-m", "sft_lightning", "fit", "--config", str(config)]
        started = psutil.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)
        while started.poll() is None:
            samples.append((time.time(), sample(started)))
            time.sleep(seconds)
    if started.returncode:
        raise SystemExit(f"{config.stem} failed:\n{(answers / 'output.txt').read_text()[-3000:]}")
    return [json.loads(file.read_text()) for file in sorted(answers.glob("*.json"))], samples
