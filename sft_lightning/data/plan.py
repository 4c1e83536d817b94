"""The epoch plan: which examples share a row, which rows an optimizer step, and what each step's loss is divided by.

Pure arithmetic on lengths and weights, the same on every rank and in every process that asks. Because it is known
before training, resuming, changing the number of GPUs, predicting steps and weighing every supervised token alike need
no communication and no state but a position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sft_lightning.data.packing import best_fit, one_per_row

Packing = Literal["best_fit", "none"]


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

    examples: npt.NDArray[np.int64]
    """Example of each document, row after row, (D,)."""

    row_starts: npt.NDArray[np.int64]
    """Where each row's documents start in `examples`, (R + 1,)."""

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
        """Return the examples of a row, in order."""
        return self.examples[self.row_starts[index] : self.row_starts[index + 1]]

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
    weights: npt.NDArray[np.float64],
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
        weights: Supervised weight of every example, (N,).
        packing: How examples share rows.
        max_length: Tokens per row.
        rows_per_step: The global batch.
        shuffle: (seed, epoch) that decide the order; `None` keeps the order of `chosen` as far as packing allows.

    Returns:
        The plan; every entry of `chosen` is in exactly one row.
    """
    if shuffle is not None:
        chosen = np.random.default_rng((*shuffle, 0)).permutation(chosen)
    rows = best_fit(lengths[chosen], max_length) if packing == "best_fit" else one_per_row(lengths[chosen])
    if shuffle is not None:
        order = np.random.default_rng((*shuffle, 1)).permutation(len(rows))
        rows = [rows[i] for i in order]
    counts = np.array([len(row) for row in rows], np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    examples = chosen[np.array([i for row in rows for i in row], np.int64)]
    row_weights = np.add.reduceat(weights[examples], starts[:-1]) if len(rows) else np.zeros(0)
    return EpochPlan(examples, starts, row_weights, rows_per_step)
