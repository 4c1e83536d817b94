"""The checks of a run as a table: for the terminal, and in Markdown for the loggers."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from sft_lightning.checks import Check


def check_title(checks: Sequence[Check]) -> str:
    """Return one line: how many checks were made, how many do not apply, and the time of all of them."""
    made = [check for check in checks if check.passed is not None]
    others = f", {len(checks) - len(made)} do not apply" if len(made) < len(checks) else ""
    verified = sum(bool(check.passed) for check in made)
    return f"checks: {verified} of {len(made)} verified{others}; {sum(check.seconds for check in checks):.1f} s"


def check_table(checks: Sequence[Check], shown: Sequence[Check]) -> Table:
    """Return a table for the terminal, readable at 100 columns.

    Args:
        checks: All checks so far; the title counts them.
        shown: Those that get a row.
    """
    table = Table(title=check_title(checks), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("check", "figure", "bound"):
        table.add_column(heading, overflow="fold")
    table.add_column("s", justify="right", no_wrap=True)
    for check in shown:  # as Text, because rich takes parts of a path such as `data/[1].json` for markup
        cells = (f"{check.sign} {check.name}", check.figure, check.bound, f"{check.seconds:.2f}")
        table.add_row(*(Text(cell) for cell in cells))
    return table


def check_markdown(checks: Sequence[Check]) -> str:
    """Return a table of all checks in Markdown."""
    lines = [check_title(checks), "", "| check | figure | bound | seconds | times |", "|---|---|---|---:|---:|"]
    for check in checks:
        cells = [f"{check.sign} {check.name}", check.figure, check.bound, f"{check.seconds:.3f}", f"{check.times}"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)
