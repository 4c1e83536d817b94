"""What became of the data: counted per source, nothing dropped without a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_LOCATIONS = 5
"""Locations kept of each reason for a drop: enough to look at, few enough for a terminal."""


@dataclass
class SourceReport:
    """Counts of one source."""

    split: str
    """train, val, test or predict."""

    format: str = ""
    records: int = 0
    """Rows read."""

    examples: int = 0
    """Examples that are trained on or evaluated."""

    tokens: int = 0
    supervised_tokens: int = 0

    length_p50: int = 0
    """Tokens that half of the examples do not exceed, before any cut or drop."""

    length_p90: int = 0
    """Tokens that 90 % of the examples do not exceed, before any cut or drop."""

    length_p99: int = 0
    """Tokens that 99 % of the examples do not exceed, before any cut or drop."""

    longest: int = 0
    """Tokens of the longest example, before any cut or drop."""

    dropped: Counter[str] = field(default_factory=Counter)
    """What was left out, by reason: examples for `overlong` and `no_supervised_tokens`, records for what is wrong with
    a record."""

    dropped_at: dict[str, list[str]] = field(default_factory=dict)
    """Where the first of them stand (`data/chat.jsonl, line 12`), by reason; at most `MAX_LOCATIONS` each."""

    repairs: Counter[str] = field(default_factory=Counter)
    """Messages left out or kept as context only, by kind: `leading_answer`, `trailing_user`, `empty_turn`."""

    rewritten_records: int = 0
    """Records that make several examples, because the template renders earlier turns otherwise once others follow."""

    rewritten_examples: int = 0
    """Examples that those records make."""

    truncated: int = 0
    """Examples cut to `max_length`."""

    supervised_tokens_lost: int = 0
    """Supervised tokens that went with cuts and drops."""

    wanted: float | None = None
    """Share of the first training epoch that the weights ask for, 0 to 1, in `DataReport.blend_unit`; `None` outside
    training."""

    delivered: float | None = None
    """Share of the first training epoch's rows that it has, 0 to 1, in `DataReport.blend_unit`."""

    def set_lengths(self, lengths: npt.NDArray[np.int64]) -> None:
        """Fill `length_p50`, `length_p90`, `length_p99` and `longest`.

        Args:
            lengths: Tokens of each example before any cut or drop, (N,). Without any, all are 0.
        """
        if not lengths.size:
            self.length_p50 = self.length_p90 = self.length_p99 = self.longest = 0
            return
        # The inverted CDF gives a length that there is, not one between two.
        found = np.percentile(lengths, [50, 90, 99, 100], method="inverted_cdf")
        self.length_p50, self.length_p90, self.length_p99, self.longest = (int(length) for length in found)


@dataclass
class DataReport:
    """Counts of all sources, and of the first epoch's rows."""

    sources: dict[str, SourceReport] = field(default_factory=dict)
    """By split and name: `train/alpaca`."""

    max_length: int = 0
    rows: int = 0
    """Rows of the first training epoch."""

    optimizer_steps: int = 0
    """Optimizer steps of the first training epoch."""

    fill: float = 0.0
    """Tokens of the first training epoch over rows × `max_length`."""

    blend_unit: str = "tokens"
    """What the sources' `wanted` and `delivered` are shares of: `examples`, `tokens` or `supervised_tokens`."""

    largest_deviation: float = 0.0
    """How far a source's share is from its share of the first epoch at the worst point of it, in packed rows."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report for `data_report.json`: dicts, lists, strings and plain numbers alone."""
        plain: dict[str, Any] = _plain(self)
        return plain


def _plain(value: Any) -> Any:
    # Not `dataclasses.asdict`: it rebuilds a Counter from its items, and so counts the pairs.
    if is_dataclass(value):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value
