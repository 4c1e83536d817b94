"""Covers benchmarks.gpu.__main__, and with cells at toy size benchmarks.gpu.inputs, ours, peers and ceilings."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import results
from benchmarks.gpu.cells import CELLS, cells_named

BY_NAME = {cell.name: cell for cell in CELLS}
FAST = ("lora-16k", "lora-16k-bare", "peft-16k")
NEEDS_A_PACKAGE = {"lora-16k-flash-attention-2": "FlashAttention2", "trl-16k": "trl", "trl-full-rows": "trl"}


@pytest.fixture(scope="module")
def toys() -> dict[str, Any]:
    """Results of some cells at toy size."""
    return {name: command.run_cell(BY_NAME[name], toy=True) for name in FAST}


def test_the_loop_without_lightning_trains_as_fit_does(toys: dict[str, Any]) -> None:
    ours, bare = toys["lora-16k"], toys["lora-16k-bare"]
    assert ours["losses"] == pytest.approx(bare["losses"], abs=1e-6)
    assert ours["grad_norms"] == pytest.approx(bare["grad_norms"], rel=1e-5)
    assert ours["tokens_per_step"] == bare["tokens_per_step"]
    assert ours["flops_per_token"] > 0


def test_a_peer_trains_on_the_same_rows(toys: dict[str, Any]) -> None:
    ours, peer = toys["lora-16k"], toys["peft-16k"]
    assert peer["tokens_per_step"] == ours["tokens_per_step"]
    assert peer["losses"] == pytest.approx(ours["losses"], abs=2e-2)  # bfloat16 adapters, other rounding
    assert peer["grad_norms"][0] == pytest.approx(ours["grad_norms"][0], rel=0.1)


@pytest.mark.parametrize("name", [cell.name for cell in CELLS if cell.kind == "ceiling"])
def test_a_ceiling_is_a_positive_figure(name: str) -> None:
    found = command.run_cell(BY_NAME[name], toy=True)
    assert found
    assert all(value > 0 for value in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [cell.name for cell in CELLS if cell.kind != "ceiling" and cell.name not in FAST])
def test_every_cell_runs_at_toy_size(name: str) -> None:
    found = command.run_cell(BY_NAME[name], toy=True)
    if "not_installed" in found:
        assert NEEDS_A_PACKAGE[name] in found["not_installed"]
    else:
        assert len(found["losses"]) == 3
        assert all(0 < norm < 10 for norm in found["grad_norms"])


class Process:
    """Stands for the process of a group: prints results, then ends."""

    started: list[list[str]] = []  # noqa: RUF012 (set by each test)

    def __init__(self, options: list[str], **kwargs: Any) -> None:
        names = options[options.index("--worker") + 1 :]
        self.started.append(names)
        self.died = "dies" in names[:2]
        done = names[: names.index("dies")] if self.died else names
        lines = [command.MARK + json.dumps({"cell": name, "answer": {"tokens_per_second": 1.0}}) for name in done]
        self.stdout = io.StringIO("\n".join(["a warning", *lines, ""]))

    def wait(self) -> int:
        return -9 if self.died else 0

    def kill(self) -> None:
        raise AssertionError("the time is not up")


def test_a_process_that_dies_costs_one_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.subprocess, "Popen", Process)
    monkeypatch.setattr(Process, "started", [])
    cells = [argparse.Namespace(name=name) for name in ("one", "dies", "two")]
    found = dict(command.measured(cells, toy=True, seconds=60))  # type: ignore[arg-type]
    assert found == {
        "one": {"tokens_per_second": 1.0}, "dies": {"error": "the process ended with status -9"},
        "two": {"tokens_per_second": 1.0},
    }  # fmt: skip
    assert Process.started == [["one", "dies", "two"], ["two"]]


def test_results_are_written_cell_by_cell_and_only_missing_cells_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, asked = tmp_path / "h200.json", list[str]()

    def measured(cells: Any, **kwargs: Any) -> Any:
        for cell in cells:
            asked.append(cell.name)
            yield cell.name, {"terabytes_per_second": 4.0}
            assert cell.name in results.read(file)["cells"]
            if cell.name == "ceiling-copy" and len(asked) < 3:
                return  # the machine goes away

    monkeypatch.setattr(command, "measured", measured)
    args = argparse.Namespace(results=file, minutes=1.0, again=False, toy=True)
    cells = cells_named(["ceilings"])
    assert command.measure(cells, {"device": "H200"}, args) == 0
    assert asked == ["ceiling-matmul", "ceiling-copy"]
    assert "2 cells are left, run the same command again" in capsys.readouterr().out
    command.measure(cells, {"device": "H200"}, args)
    assert asked == ["ceiling-matmul", "ceiling-copy", "ceiling-attention", "ceiling-head-128k"]


def test_an_error_of_a_cell_is_its_result_and_the_status_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "measured", lambda cells, **kwargs: [(cells[0].name, {"error": "too large"})])
    args = argparse.Namespace(results=tmp_path / "h200.json", minutes=1.0, again=False, toy=True)
    assert command.measure(cells_named(["ceiling-copy"]), {"device": "H200"}, args) == 1


def test_a_library_that_is_not_installed_is_said_and_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = command.run_cell(BY_NAME["trl-16k"], toy=True)
    assert found == {"not_installed": "trl is not installed"}
    monkeypatch.setattr(command, "measured", lambda cells, **kwargs: [(cells[0].name, found)])
    args = argparse.Namespace(results=tmp_path / "h200.json", minutes=1.0, again=False, toy=True)
    assert command.measure(cells_named(["trl-16k"]), {"device": "H200"}, args) == 0
    assert "| trl-16k | trl is not installed |" in args.results.with_suffix(".md").read_text()


def test_without_a_gpu_the_command_offers_toy_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "facts", lambda toy: {"device": "cpu"})
    with pytest.raises(SystemExit, match="no CUDA device; add --toy"):
        command.main([])
    assert command.main(["--list"]) == 0
