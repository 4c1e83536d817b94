"""A `DataReport` as tables for the terminal: records, lengths, drops, cuts and repairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from sft_lightning.data.sources.report import DataReport, SourceReport

_TEXT_COLUMNS = ("source", "format", "what", "first locations")
_MAX_PLACES = 3
"""Locations to show for each reason of a drop; `data_report.json` has more."""


def report_tables(report: DataReport) -> list[Table | str]:
    """Return the tables of a report, readable at 100 columns; empty tables are left out.

    Returns:
        Tables, and lines of plain text without rich markup, in the order to print.
    """
    if not report.sources:
        return ["data: no source was read"]
    parts: list[Table | str] = [_read(report), _lengths(report)]
    losses = _losses(report)
    if losses.row_count:
        parts.append(losses)
    if report.rows:
        parts.append(_first_epoch(report))
    return parts


def _first_epoch(report: DataReport) -> str:
    line = (
        f"{report.rows:,} rows of {report.max_length:,} tokens, {report.fill:.1%} full; "
        f"{report.optimizer_steps:,} optimizer steps per epoch"
    )
    blended = sum(source.wanted is not None for source in report.sources.values())
    if blended < 2:  # a single source has the whole epoch
        return line
    return f"{line}; every source is within {report.largest_deviation:.1f} rows of its share throughout the epoch"


def _read(report: DataReport) -> Table:
    table = _table("data", ("source", "format", "records", "examples", "tokens", "supervised"))
    for name, source in report.sources.items():
        share = source.supervised_tokens / max(1, source.tokens)
        counts = (source.records, source.examples, source.tokens)
        _add(table, name, source.format, *(f"{count:,}" for count in counts), _supervised(source, share))
    return table


def _supervised(source: SourceReport, share: float) -> str:
    return f"{source.supervised_tokens:,} ({share:.0%})"


def _lengths(report: DataReport) -> Table:
    """Return the table of tokens per example and, in a blend, of the share of each source in the epoch."""
    blended = any(source.wanted is not None for source in report.sources.values())
    shares = (f"wanted ({report.blend_unit})", "delivered") if blended else ()
    table = _table("tokens per example, before data.overlong", ("source", "median", "90%", "99%", "longest", *shares))
    for name, source in report.sources.items():
        lengths = (source.length_p50, source.length_p90, source.length_p99, source.longest)
        cells = [f"{length:,}" for length in lengths]
        if blended:
            cells += [_percent(source.wanted), _percent(source.delivered)]
        _add(table, name, *cells)
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _losses(report: DataReport) -> Table:
    table = _table("dropped, truncated or repaired", ("source", "what", "count", "first locations"))
    for name, source in report.sources.items():
        shown = name
        for what, count, places in _losses_of(source):
            _add(table, shown, what, f"{count:,}", "\n".join(places[:_MAX_PLACES]))
            shown = ""  # the name only in the first row
    return table


def _losses_of(source: SourceReport) -> Iterator[tuple[str, int, Sequence[str]]]:
    """Yield (what, count, first locations) of every drop, repair, cut and rewriting."""
    for reason, count in source.dropped.items():
        yield f"dropped: {reason}", count, source.dropped_at.get(reason, [])
    for kind, count in source.repairs.items():
        yield f"repaired: {kind}", count, []
    if source.truncated:
        yield "examples truncated", source.truncated, []
    if source.supervised_tokens_lost:
        yield "supervised tokens lost", source.supervised_tokens_lost, []
    if source.rewritten_records:
        yield f"records rewritten to {source.rewritten_examples:,} examples", source.rewritten_records, []


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        if heading in _TEXT_COLUMNS:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(
                heading, justify="right", no_wrap=True
            )  # text columns shrink instead: half a number is another number
    return table


def _add(table: Table, *cells: str) -> None:
    # As Text, because rich takes parts of a path such as `data/[1].json` for markup.
    table.add_row(*(Text(cell) for cell in cells))
