"""The epoch plan: which examples share a row, which rows an optimizer step, and what each step's loss is divided by.

Pure arithmetic on lengths and weights, the same on every rank and in every process that asks. Because it is known
before training, resuming, changing the number of GPUs, predicting steps and weighing every supervised token alike need
no communication and no state but a position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sft_lightning.data.packing import Part, best_fit, concat, one_per_row

Packing = Literal["best_fit", "concat", "none"]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How an optimizer step's rows are dealt out."""

    batch_size: int = 1
    """Rows per micro-batch and device."""

    accumulate: int = 1
    """Micro-batches per optimizer step."""

    world_size: int = 1
    """Devices."""

    rank: int = 0
    """This device, from 0."""

    @property
    def rows_per_step(self) -> int:
        """The global batch: rows per optimizer step over all devices and micro-batches."""
        return self.batch_size * self.accumulate * self.world_size

    @property
    def rows_per_micro_batch(self) -> int:
        """Rows that all devices together take in one micro-batch."""
        return self.batch_size * self.world_size


@dataclass(frozen=True)
class EpochPlan:
    """One epoch's rows, in the order in which they are trained."""

    documents: npt.NDArray[np.int64]
    """Example, first token and end of each document, row after row, (D, 3)."""

    row_starts: npt.NDArray[np.int64]
    """Where each row's documents start in `documents`, (R + 1,)."""

    row_weights: npt.NDArray[np.float64]
    """Supervised weight of each row, (R,)."""

    rows_per_step: int
    """Rows of an optimizer step; the last step of the epoch may have fewer."""

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the epoch."""
        return -(-self.num_rows // self.rows_per_step)

    def row(self, index: int) -> npt.NDArray[np.int64]:
        """Return the documents of a row, in order, (documents, 3)."""
        return self.documents[self.row_starts[index] : self.row_starts[index + 1]]

    def step_weight(self, step: int) -> float:
        """Return the supervised weight of an optimizer step: the denominator of its loss."""
        return float(self.row_weights[step * self.rows_per_step : (step + 1) * self.rows_per_step].sum())

    def num_micro_batches(self, topology: Topology) -> int:
        """Return the micro-batches that every rank takes in the epoch."""
        return -(-self.num_rows // topology.rows_per_micro_batch)

    def micro_batches_done(self, rows: int, topology: Topology) -> int:
        """Return how many micro-batches of whole optimizer steps lie in the epoch's first `rows` rows."""
        if rows >= self.num_rows:
            return self.num_micro_batches(topology)
        return rows // topology.rows_per_step * topology.accumulate

    def micro_batch(self, index: int, topology: Topology) -> list[int]:
        """Return the rows of one rank's micro-batch; fewer than `batch_size`, or none, only at the end of the epoch."""
        first = index * topology.rows_per_micro_batch + topology.rank * topology.batch_size
        return list(range(min(first, self.num_rows), min(first + topology.batch_size, self.num_rows)))


def plan_epoch(
    chosen: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    weigh: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]],
    *,
    packing: Packing,
    max_length: int,
    rows_per_step: int,
    shuffle: tuple[int, int] | None,
) -> EpochPlan:
    """Plan one epoch.

    Args:
        chosen: Examples to see, with repeats, (E,).
        lengths: Tokens of every example, (N,).
        weigh: Documents, (D, 3) → their supervised weights, (D,).
        packing: How examples share rows.
        max_length: Tokens per row.
        rows_per_step: The global batch.
        shuffle: (seed, epoch) that decide the order; `None` keeps the order of `chosen` as far as packing allows.

    Returns:
        The plan; every entry of `chosen` is in exactly one row, with `concat` perhaps in several parts.
    """
    if shuffle is not None:
        chosen = np.random.default_rng((*shuffle, 0)).permutation(chosen)
    rows = _pack(lengths[chosen], packing, max_length)
    if shuffle is not None:
        order = np.random.default_rng((*shuffle, 1)).permutation(len(rows))
        rows = [rows[i] for i in order]
    row_starts = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    documents = np.array([part for row in rows for part in row], np.int64).reshape(-1, 3)
    documents[:, 0] = chosen[documents[:, 0]]
    row_weights = np.add.reduceat(weigh(documents), row_starts[:-1]) if rows else np.zeros(0)
    return EpochPlan(documents, row_starts, row_weights, rows_per_step)


def _pack(lengths: npt.NDArray[np.int64], packing: Packing, max_length: int) -> list[list[Part]]:
    if packing == "best_fit":
        return best_fit(lengths, max_length)
    return concat(lengths, max_length) if packing == "concat" else one_per_row(lengths)
