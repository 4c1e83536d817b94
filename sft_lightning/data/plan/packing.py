"""Lengths of examples → rows of at most `max_length` tokens: which part of which example is in which row.

Only `concat` cuts examples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sft_lightning.types import Longs


class Rows(NamedTuple):
    """R packed rows of D documents together."""

    documents: Longs
    """(example, first token, end) of each document, row after row, (D, 3)."""

    starts: Longs
    """Index of each row's first document, and D, (R + 1,)."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def counts(self) -> Longs:
        """Documents of each row, (R,)."""
        return np.diff(self.starts)

    @property
    def lengths(self) -> Longs:
        """Tokens of each row, (R,)."""
        return self.sums(self.documents[:, 2] - self.documents[:, 1])

    def sums(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the sums of values of the documents, (D, …), over each row, (R, …)."""
        return np.add.reduceat(values, self.starts[:-1]) if len(self) else values[:0]

    def take(self, order: Longs) -> Rows:
        """Return the rows at the indices `order`, in that order."""
        counts = self.counts[order]
        starts = group_starts(counts)
        picked = np.arange(starts[-1]) + np.repeat(self.starts[:-1][order] - starts[:-1], counts)
        return Rows(self.documents[picked], starts)

    def renumbered(self, examples: Longs) -> Rows:
        """Return the same rows with example i renamed to `examples[i]`."""
        documents = self.documents.copy()
        documents[:, 0] = examples[documents[:, 0]]
        return Rows(documents, self.starts)


def join_rows(parts: list[Rows]) -> Rows:
    """Return the rows of all parts, one part after the other."""
    return Rows(
        np.concatenate([np.zeros((0, 3), np.int64), *(part.documents for part in parts)]),
        group_starts(np.concatenate([np.zeros(0, np.int64), *(part.counts for part in parts)])),
    )


def group_starts(counts: Longs) -> Longs:
    """Return the index at which each of G groups starts, and the end of the last, (G + 1,), given their sizes, (G,)."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def best_fit(lengths: Longs, max_length: int) -> Rows:
    """Pack examples into rows by best-fit decreasing.

    Each example, longest first, goes into the fullest row that still has room for it. Examples of the same length are
    placed together: the fullest row with room takes as many of them as fit, then the next. The bits of one Python
    integer say which amounts of free room there are, so the fullest row with room is the lowest set bit at or above the
    length. Best-fit decreasing needs at most 11/9 · optimum + 4 rows (Johnson et al., 1974).

    Args:
        lengths: Tokens of each example, each in 1..max_length, (N,).
        max_length: Tokens per row.

    Returns:
        Rows of whole examples; each example is in exactly one.

    Raises:
        ValueError: If a length is outside 1..max_length.
    """
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= max_length):
        raise ValueError(f"lengths must be in 1..{max_length}, found {lengths.min()}..{lengths.max()}")
    order = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    rooms = 0  # bit r is set while some row has exactly r tokens of room
    num_rows = placed = 0
    distinct, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else max_length
            per_row = room // length
            needed = -(-count // per_row)
            if fitting:
                rows = rows_with_room[room][-needed:]
                del rows_with_room[room][-needed:]
                if not rows_with_room[room]:
                    rooms ^= 1 << room
            else:
                rows = list(range(num_rows, num_rows + needed))
                num_rows += needed
            now = min(count, per_row * len(rows))
            row_of[placed : placed + now] = np.repeat(rows, per_row)[:now] if per_row > 1 else rows
            placed += now
            count -= now
            rooms |= _put_back(rows_with_room, rows[:-1], room - per_row * length)
            in_last = now - per_row * (len(rows) - 1)
            rooms |= _put_back(rows_with_room, rows[-1:], room - in_last * length)
    by_row = np.argsort(row_of, kind="stable")
    examples = order[by_row]
    documents = np.stack([examples, np.zeros_like(examples), lengths[examples]], axis=1)
    return Rows(documents, group_starts(np.bincount(row_of, minlength=num_rows)))


def _put_back(rows_with_room: list[list[int]], rows: list[int], room: int) -> int:
    """List rows under the room that they have left, and return the bit of that room; full rows are not listed."""
    if not rows or not room:
        return 0
    rows_with_room[room] += rows
    return 1 << room


def one_per_row(lengths: Longs) -> Rows:
    """Give each example its own row, in order.

    Args:
        lengths: Tokens of each example, (N,).
    """
    examples = np.arange(len(lengths))
    return Rows(np.stack([examples, np.zeros_like(examples), lengths], axis=1), np.arange(len(lengths) + 1))


def concat(lengths: Longs, max_length: int) -> Rows:
    """Write all examples one after the other and cut after every `max_length` tokens; only the last row may be shorter.

    Args:
        lengths: Tokens of each example, each at least 1, (N,).
        max_length: Tokens per row.

    Returns:
        Rows in order; each token of each example is in exactly one.
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.arange(max_length, total, max_length)
    stops = np.union1d(ends, cuts)
    firsts = np.concatenate([[0], stops[:-1]]).astype(np.int64)[: len(stops)]
    examples = np.searchsorted(ends, stops)
    before = ends - lengths
    documents = np.stack([examples, firsts - before[examples], stops - before[examples]], axis=1).astype(np.int64)
    return Rows(documents.reshape(-1, 3), group_starts(np.bincount(firsts // max_length)))
