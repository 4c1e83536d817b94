from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import results
from benchmarks.gpu.cells import CELLS, Cell

CELL = next(cell for cell in CELLS if cell.name == "lora-16k")


def answer(tokens_per_second: float, **more: Any) -> dict[str, Any]:
    return {
        "tokens_per_second": tokens_per_second, "seconds_per_step": 0.8, "losses": [10.4, 10.3], "grad_norms": [0.2],
        **more,
    }  # fmt: skip


def test_an_unfinished_file_is_continued_and_a_finished_one_is_not(tmp_path: Path) -> None:
    today = tmp_path / f"nvidia_h200_{date.today().isoformat()}.json"
    assert results.result_file("NVIDIA H200", tmp_path) == today
    earlier = tmp_path / "nvidia_h200_2020-01-01.json"
    results.write(earlier, {"device": "NVIDIA H200", "finished": False, "cells": {}})
    assert results.result_file("NVIDIA H200", tmp_path) == earlier
    assert results.result_file("NVIDIA H200 NVL", tmp_path) != earlier
    results.write(earlier, {"device": "NVIDIA H200", "finished": True, "cells": {}})
    assert results.result_file("NVIDIA H200", tmp_path) == today


def test_what_is_written_is_read_again_with_a_table_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "new" / "h200.json"
    assert results.missing([CELL], results.read(file)) == [CELL]
    found = {"device": "H200", "finished": False, "cells": {CELL.name: answer(19_500.0, peak_gib=80.0)}}
    results.write(file, found)
    assert results.read(file) == found
    assert results.missing([CELL], found) == []
    assert sorted(path.name for path in file.parent.iterdir()) == ["h200.json", "h200.md"]
    (row,) = [line for line in file.with_suffix(".md").read_text().splitlines() if line.startswith("| lora-16k")]
    assert "19,500" in row
    assert "10.4000 10.3000" in row
    assert "| yes; unknown |" in row  # the bare loop was not measured


@pytest.mark.parametrize(("bare", "reached"), [(10_000.0, True), (10_500.0, False), (None, None)])
def test_a_goal_beside_another_cell_needs_that_cell(bare: float | None, reached: bool | None) -> None:
    cell = Cell(name="ours", group="lora", goal={"bare": 0.99})
    answers = {"ours": answer(10_000.0)} | ({} if bare is None else {"bare": answer(bare)})
    ((words, found),) = results.goals_of(cell, answers)
    assert found is reached
    assert words.startswith("≥ 0.99 × bare")


def test_a_failed_cell_stands_in_the_table_with_its_error() -> None:
    page = results.page({"device": "H200", "cells": {"lora-16k": {"error": "OutOfMemoryError: a | b\nc"}}})
    assert "| lora-16k | OutOfMemoryError: a / b c |" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {len(results.HEAD) + 1}


def test_ceilings_are_listed_below_the_table() -> None:
    page = results.page({"device": "H200", "cells": {"ceiling-copy": {"terabytes_per_second": 4.3123}}})
    assert page.endswith("- ceiling-copy: terabytes_per_second 4.312")
    json.dumps(page)
