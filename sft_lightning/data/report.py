"""What became of the data: counted per source, nothing dropped without a reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


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
    longest: int = 0
    """Tokens of the longest example, before any cut."""

    dropped: Counter[str] = field(default_factory=Counter)
    """Examples left out, by reason: `overlong`, `no_supervised_tokens`."""

    truncated: int = 0
    """Examples cut to `max_length`."""

    supervised_tokens_lost: int = 0
    """Supervised tokens that went with cuts and drops."""


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

    def as_dict(self) -> dict[str, Any]:
        """Return the report for `data_report.json`."""
        return asdict(self)
