"""What happened to each record of a source while examples were made of it: repaired, rewritten, dropped and why."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

REWRITTEN = "rewritten"
"""Mark of a record that makes several examples because the template rewrites earlier messages once others follow."""

_LOCATIONS_KEPT = 20
"""Locations of dropped records to keep for each reason."""


@dataclass
class RecordLog:
    """What happened to the records of a source while examples were made of them."""

    format: str = ""
    """The format, configured or detected."""

    codes: list[str] = field(default_factory=list)
    """What happened to records, one bit of `marks` each: reasons for a drop, repairs, and `rewritten`."""

    marks: array[int] = field(default_factory=lambda: array("I"))
    """For each record read, the bits of what happened to it."""

    dropped: list[str] = field(default_factory=list)
    """The codes that are reasons for a drop."""

    dropped_at: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Index and location of the first dropped records, by reason."""

    def mark(self, code: str) -> None:
        """Note that something happened to the last record."""
        if code not in self.codes:
            self.codes.append(code)
        self.marks[-1] |= 1 << self.codes.index(code)

    def drop(self, reason: str, location: str) -> None:
        """Note that the last record is dropped.

        Args:
            reason: Why; a code of the data report.
            location: Location of the record.
        """
        self.mark(reason)
        if reason not in self.dropped:
            self.dropped.append(reason)
        places = self.dropped_at.setdefault(reason, [])
        if len(places) < _LOCATIONS_KEPT:
            places.append((len(self.marks) - 1, location))

    def marks_array(self) -> npt.NDArray[np.uint32]:
        """Return the marks, (records,)."""
        return np.array(self.marks, np.uint32)

    def facts(self) -> dict[str, Any]:
        """Return everything except the marks, for a store's manifest."""
        return {
            "format": self.format,
            "codes": self.codes,
            "dropped": self.dropped,
            "dropped_at": self.dropped_at,
        }
