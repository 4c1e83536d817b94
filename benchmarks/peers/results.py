"""Print a benchmark's results as a table, and write them to `benchmarks/results/`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from markdown_table import markdown_table
from processes import hardware
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parents[1] / "results"


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table for the terminal, then the same table as Markdown for the docs.

    Args:
        head: Names of the columns.
        rows: One cell per column.
    """
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    print(markdown_table(head, rows))


def write_results(name: str, /, **results: object) -> None:
    """Write `results/<name>_<date>.json` and print its path.

    Args:
        name: Name of the benchmark and of what distinguishes its runs: `train_cpu_float32`.
        results: Contents of the file, after the date and the hardware.
    """
    today = date.today().isoformat()
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}_{today}.json"
    file.write_text(json.dumps({"date": today, "hardware": hardware(), **results}, indent=2) + "\n")
    print(f"written to {os.path.relpath(file)}")
