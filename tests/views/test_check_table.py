from __future__ import annotations

import io

from rich.console import Console

from sft_lightning.checks import Check
from sft_lightning.views.check_table import check_markdown, check_table, check_title

CHECKS = [
    Check("masks", True, "8 documents of data/[x].json", seconds=0.25),
    Check("loss", True, "2.3026 | 2.3026", "at most 1.0e-04", seconds=0.5, times=2),
    Check("isolation", None, "no row has two documents"),
]


def test_the_title_counts_what_was_verified() -> None:
    assert check_title(CHECKS) == "checks: 2 of 2 verified, 1 do not apply; 0.8 s"
    assert check_title([*CHECKS[:2], Check("epoch", False, "")]) == "checks: 2 of 3 verified; 0.8 s"


def test_the_table_has_outcome_figure_bound_and_time_of_the_checks_that_are_shown() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(check_table(CHECKS, CHECKS[:2]), markup=False)
    text = out.getvalue()
    assert "✓ masks" in text
    assert "data/[x].json" in text
    assert "at most 1.0e-04" in text
    assert "0.50" in text
    assert "isolation" not in text


def test_the_markdown_table_has_every_check() -> None:
    lines = check_markdown(CHECKS).splitlines()
    assert len(lines) == 7
    assert lines[5] == "| ✓ loss | 2.3026 \\| 2.3026 | at most 1.0e-04 | 0.500 | 2 |"
    assert lines[6].startswith("| – isolation |")
