"""A batch as it arrives → its documents, each with the example of the plan that it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sft_lightning.types import IGNORE_INDEX, Longs, SharedPrompt, num_tokens


class BatchDocument(NamedTuple):
    """A document of a batch; one of the two answers of a pair."""

    number: int
    """Number of its example in the plan."""

    half: int
    """0 for a conversation or the chosen answer of a pair, 1 for the rejected one."""

    ids: Longs
    """Token ids, (L,)."""

    labels: Longs
    """Labels, (L,)."""

    weights: npt.NDArray[np.float32]
    """Loss weights, (L,)."""

    positions: Longs
    """Positions, (L,)."""

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the document, whatever its record is."""
        labelled = self.labels != IGNORE_INDEX
        if (labelled & (self.labels != self.ids)).any():
            yield "labels differ from the token ids"
        if (labelled != (self.weights > 0)).any():
            yield "labels and loss weights are on different tokens"
        if (self.positions != np.arange(len(self.ids))).any():
            yield f"positions begin with {self.positions[:4].tolist()}"
        if labelled[:1].any():
            yield "its first token has a label, but no token of the document predicts it"


def batch_documents(
    batch: Any, rows: Sequence[Sequence[int]], *, halves: int = 1, together: bool = True
) -> tuple[list[BatchDocument], list[str]]:
    """Return the documents of a batch, in order, and what is wrong with its padding.

    Args:
        batch: The batch as training gets it.
        rows: The examples of each row, by the plan.
        halves: 2 for pairs, of which each answer is a document.
        together: Whether both answers of a pair are in the same row; else each has its own row, after the other.
    """
    columns = [batch[name].cpu().numpy() for name in ("input_ids", "labels", "position_ids")]
    columns.insert(2, batch["loss_weights"].float().cpu().numpy())
    entries = [list(row) for row in batch["document_lengths"]]
    wanted = [[(number, half) for number in row for half in range(halves)] for row in rows]
    if not together:
        wanted = _one_by_one([each for row in wanted for each in row], entries)
    found: list[BatchDocument] = []
    wrong: list[str] = []
    for r, waiting in enumerate(entries):
        start, row = 0, wanted[r] if r < len(wanted) else []
        while row:
            (number, half), length = row.pop(0), waiting.pop(0)
            if isinstance(length, SharedPrompt):
                row.pop(0)  # the other answer
                found += _shared(columns, r, start, length, number)
            else:
                found.append(_document(columns, r, np.arange(start, start + length), number, half))
            start += num_tokens(length)
        wrong += _padding(columns, r, start)
    return found, wrong


def _one_by_one(halves: list[tuple[int, int]], entries: Sequence[Sequence[Any]]) -> list[list[tuple[int, int]]]:
    """Return the answers of each row, of which each has its own unless it shares its prompt with the other one."""
    rows = []
    for row in entries:
        taken = 2 if isinstance(row[0], SharedPrompt) else 1
        rows.append(halves[:taken])
        halves = halves[taken:]
    return rows


def _document(columns: Sequence[Any], row: int, tokens: Longs, number: int, half: int) -> BatchDocument:
    return BatchDocument(number, half, *(column[row][tokens] for column in columns))


def _shared(columns: Sequence[Any], row: int, start: int, length: SharedPrompt, number: int) -> list[BatchDocument]:
    """Return both answers of a pair whose common beginning is in the row once."""
    common = np.arange(start, start + length.common)
    first = start + length.common + np.arange(length.first)
    second = start + length.common + length.first + np.arange(length.second)
    return [
        _document(columns, row, np.concatenate([common, rest]), number, half)
        for half, rest in enumerate((first, second))
    ]


def _padding(columns: Sequence[Any], row: int, start: int) -> list[str]:
    _, labels, weights, _ = columns
    if (labels[row, start:] != IGNORE_INDEX).any() or weights[row, start:].any():
        return [f"row {row + 1}: padding has a label or a loss weight"]
    return []
