"""Covers sft_lightning.training.checks and what else stops a run that does not train what its configuration says.

Each fault of the YAML files beside this module is planted in a copy of the packages, in which `fit` then runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOZEN = (
    "double-bos",
    "user-supervised-in-supervision",
    "mask-shifted-in-collate",
    "stop-unsupervised-in-collate",
    "example-dropped-while-packing",
    "denominator-per-micro-batch",
    "lengths-ignored-in-forward",
    "double-shift",
    "one-layer-frozen",
    "schedule-stepped-twice",
    "model-in-eval-mode",
    "export-without-template",
)
"""Faults of every stage of a run: text, batches, model, training, export."""


def plant(*options: str, file: Path) -> list[dict[str, Any]]:
    """Run the faults that the options choose, and return what came of each."""
    command = [sys.executable, "-m", "benchmarks.faults", *options, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert file.is_file(), done.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    return rows


def test_fit_stops_on_faults_of_every_stage_and_passes_without_one(tmp_path: Path) -> None:
    options = ("--only", "clean", *DOZEN, "--scenario", "packed", "--commands", "fit", "--workers", "1")
    rows = plant(*options, file=tmp_path / "rows.json")
    assert len(rows) == 1 + len(DOZEN)
    assert [row for row in rows if row["bad"]] == []


@pytest.mark.slow
def test_no_fault_passes_both_fit_and_selftest_and_there_are_no_false_alarms(tmp_path: Path) -> None:
    rows = plant(file=tmp_path / "rows.json")
    assert [row for row in rows if row["bad"]] == []
    assert sum(row["fit"]["caught"] for row in rows) >= 40
