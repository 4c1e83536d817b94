"""Write Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table.

    Args:
        head: Names of the columns.
        rows: The cells of each row, one per column.
    """
    return "\n".join(map(markdown_row, [head, ["---"] * len(head), *rows]))


def markdown_row(cells: Sequence[str]) -> str:
    """Return one row of a table."""
    return f"| {' | '.join(cells)} |"
