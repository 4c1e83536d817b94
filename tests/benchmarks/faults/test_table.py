from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from benchmarks.faults.faults import Edit, Fault
from benchmarks.faults.table import Outcome, Row, counts, print_table, write_json

CAUGHT = Outcome(True, "check failed: masks | of chats", 1.5, "fit")
PASSED = Outcome(False, "", 2.0, "fit")
HUNG = Outcome(False, "still running after 120 s", 120.0, "fit")
FAULT = Fault(name="double-bos", wrong="two BOS", scenario="packed", edits=(Edit("a", "b"),))
CLEAN = Fault(name="clean: packed", wrong="", scenario="packed")


@pytest.mark.parametrize(
    ("fault", "outcome", "bad"),
    [
        (FAULT, CAUGHT, False),
        (FAULT, PASSED, True),
        (FAULT, HUNG, True),
        (CLEAN, CAUGHT, True),
        (CLEAN, PASSED, False),
        (CLEAN, HUNG, True),
    ],
)
def test_a_fault_must_be_caught_and_a_run_without_one_must_pass(fault: Fault, outcome: Outcome, bad: bool) -> None:
    assert Row(fault, {"fit": outcome, "selftest": None}).is_bad is bad


def test_the_table_has_a_row_for_each_fault_and_the_counts() -> None:
    file = io.StringIO()
    print_table([Row(FAULT, {"fit": CAUGHT, "selftest": None}), Row(CLEAN, {"fit": CAUGHT, "selftest": None})], file)
    assert "| double-bos | caught, 1.5 s | – | check failed: masks \\| of chats |" in file.getvalue()
    assert "1 faults, fit notices 1, selftest notices 0, 0 pass unnoticed; 1 false alarms in 1 scen" in file.getvalue()


def test_a_hang_is_said() -> None:
    file = io.StringIO()
    print_table([Row(FAULT, {"fit": HUNG})], file)
    assert "| double-bos | hangs, 120.0 s |" in file.getvalue()
    assert "1 pass unnoticed" in counts([Row(FAULT, {"fit": HUNG})])


def test_json_has_the_whole_messages(tmp_path: Path) -> None:
    write_json([Row(FAULT, {"fit": CAUGHT, "selftest": None})], tmp_path / "rows.json")
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["bad"] is False
    assert row["fit"] == {"caught": True, "message": CAUGHT.message, "seconds": 1.5, "command": "fit"}
    assert row["selftest"] is None
