"""The data report: what was read, kept, cut, repaired and dropped, counted by source and reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_LOCATIONS = 5
"""Locations of dropped records to keep for each reason: few enough for a terminal."""


@dataclass
class SourceReport:
    """Counts of one source."""

    split: str
    """train, val, test or predict."""

    format: str = ""
    """Format of the records, configured or detected."""

    records: int = 0
    """Records read."""

    examples: int = 0
    """Examples that are trained on or evaluated."""

    tokens: int = 0
    """Tokens of those examples."""

    supervised_tokens: int = 0
    """Tokens with a loss of those examples."""

    length_p50: int = 0
    """Median length of the examples in tokens, before any cut or drop."""

    length_p90: int = 0
    """90th percentile of the lengths in tokens, before any cut or drop."""

    length_p99: int = 0
    """99th percentile of the lengths in tokens, before any cut or drop."""

    longest: int = 0
    """Length of the longest example in tokens, before any cut or drop."""

    dropped: Counter[str] = field(default_factory=Counter)
    """Number of drops by reason: examples for `overlong`, `too_short` and `no_supervised_tokens`, else records."""

    dropped_at: dict[str, list[str]] = field(default_factory=dict)
    """Locations of the first drops (`data/chat.jsonl, line 12`) by reason; at most `MAX_LOCATIONS` each."""

    repairs: Counter[str] = field(default_factory=Counter)
    """Number of repaired records by code: `leading_answer`, `trailing_user`, `empty_turn`."""

    rewritten_records: int = 0
    """Records that make several examples because the template rewrites earlier messages once others follow."""

    rewritten_examples: int = 0
    """Examples of those records."""

    truncated: int = 0
    """Examples cut to `max_length`."""

    supervised_tokens_lost: int = 0
    """Supervised tokens lost to cuts and drops."""

    wanted: float | None = None
    """Share of the first training epoch that the weights ask for, 0 to 1, in `DataReport.blend_unit`; `None` outside
    training."""

    delivered: float | None = None
    """Share of the first training epoch that the source has, 0 to 1, in `DataReport.blend_unit`; `None` outside
    training."""

    def set_lengths(self, lengths: npt.NDArray[np.int64]) -> None:
        """Fill `length_p50`, `length_p90`, `length_p99` and `longest`.

        Args:
            lengths: Tokens of each example before any cut or drop, (N,). Without examples, all four become 0.
        """
        if not lengths.size:
            self.length_p50 = self.length_p90 = self.length_p99 = self.longest = 0
            return
        # The inverted CDF gives the length of an example, not a value between two lengths.
        found = np.percentile(lengths, [50, 90, 99, 100], method="inverted_cdf")
        self.length_p50, self.length_p90, self.length_p99, self.longest = (int(length) for length in found)


@dataclass
class DataReport:
    """Counts of all sources, and of the rows of the first training epoch."""

    sources: dict[str, SourceReport] = field(default_factory=dict)
    """Counts of each source, by split and name: `train/alpaca`."""

    max_length: int = 0
    """`data.max_length`, in tokens."""

    rows: int = 0
    """Rows of the first training epoch."""

    optimizer_steps: int = 0
    """Optimizer steps of the first training epoch."""

    fill: float = 0.0
    """Tokens of the first training epoch divided by rows × `max_length`, 0 to 1."""

    blend_unit: str = "tokens"
    """Unit of the shares `wanted` and `delivered`: `examples`, `tokens` or `supervised_tokens`."""

    largest_deviation: float = 0.0
    """Largest distance of a source from its share at any point of the first epoch, in packed rows."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report for `data_report.json`: dicts, lists, strings and plain numbers only."""
        plain: dict[str, Any] = _plain(self)
        return plain


def _plain(value: Any) -> Any:
    # Not `dataclasses.asdict`: it rebuilds a Counter from its items, which counts the pairs.
    if is_dataclass(value):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value
