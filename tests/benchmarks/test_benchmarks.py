"""Covers the modules that the benchmarks share, and the `--help` of each benchmark."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LIBRARIES = {"equality_gradients", "equality_resume", "family_models", "markdown_table", "tiny_runs"}
SCRIPTS = sorted(file.stem for file in BENCHMARKS.glob("*.py") if file.stem not in LIBRARIES)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    return importlib.import_module


def test_results_are_written_after_the_date_and_the_hardware(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = load("results")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    results.write_results("speed_cpu", python="3.11", runs=[1, 2])
    (file,) = (tmp_path / "results").iterdir()
    content = json.loads(file.read_text())
    assert list(content) == ["date", "hardware", "python", "runs"]
    assert file.name == f"speed_cpu_{content['date']}.json"
    assert f"{file.name}\n" in capsys.readouterr().out


def test_a_table_is_printed_again_as_markdown(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    load("results").print_table(["", "seconds"], [["ours", "1.5"]])
    assert capsys.readouterr().out.endswith("|  | seconds |\n| --- | --- |\n| ours | 1.5 |\n")


def test_missing_real_data_ends_a_benchmark_with_the_name_of_the_variable(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_data = load("real_data")
    monkeypatch.setattr(real_data, "REAL_DATA", tmp_path)
    with pytest.raises(SystemExit, match=r"SFT_REAL_DATA: .* has no tokenizer/qwen2\.5"):
        real_data.require_real_data("tokenizer/qwen2.5")
    (tmp_path / "model").mkdir()
    assert real_data.require_real_data("model") == tmp_path / "model"


@pytest.mark.slow
def test_a_script_that_fails_in_several_processes_shows_its_error(load: Any, tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise ValueError('no such model')")
    with pytest.raises(RuntimeError, match=r"(?s)broken\.py failed in 1 processes:.*no such model"):
        load("tiny_runs").run_in_processes(str(script), {}, 1)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_shows_its_help(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{script}.py"), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: {script}.py" in done.stdout
