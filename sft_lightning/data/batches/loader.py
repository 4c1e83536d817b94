"""Micro-batches of one rank, in the order of the plan.

Rows are slices of arrays that are already tokenized, so collating takes microseconds and no worker process is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sft_lightning.batch import Batch, RowSums
from sft_lightning.data.plan.epoch_plan import EpochPlan, Topology
from sft_lightning.types import IGNORE_INDEX, Longs, TokenizedExample


class Document(NamedTuple):
    """A document of a row."""

    number: int
    """Number of the example that it is, or is a part of."""

    tokens: TokenizedExample
    """Its tokens and loss weights."""

    planned: RowSums
    """What it adds to its step, by the plan."""


class LastBatch(NamedTuple):
    """The micro-batch that was trained on last."""

    epoch: int
    """Its epoch, from 0."""

    number: int
    """Its number in the epoch, from 0, on each rank."""

    within_step: bool = False
    """Whether its optimizer step is not finished."""

    def step_after(self, accumulate: int) -> int:
        """Return the optimizer step that a continued run takes next, counted within the epoch.

        Args:
            accumulate: Micro-batches per optimizer step.
        """
        return self.number // accumulate if self.within_step else -(-(self.number + 1) // accumulate)


class Examples(Protocol):
    """Numbered examples."""

    def example(self, index: int, start: int, stop: int) -> TokenizedExample:
        """Return tokens of an example.

        Args:
            index: Number of the example.
            start: Its first token to take.
            stop: Its first token not to take.
        """

    def weigh(self, documents: Longs) -> npt.NDArray[np.float64]:
        """Return the supervised weight of each document, (D,).

        Args:
            documents: Example, first token and end of each, (D, 3).
        """

    def supervise(self, documents: Longs) -> Longs:
        """Return how many tokens of each document are supervised, (D,).

        Args:
            documents: Example, first token and end of each, (D, 3).
        """


Collate = Callable[[Sequence[Sequence[Document]], float], Batch]
"""(documents of each row, supervised weight of the optimizer step) → Batch."""


def documents_of(plan: EpochPlan, rows: Sequence[int], examples: Examples) -> list[list[Document]]:
    """Return the documents of some rows, row by row.

    Args:
        plan: The plan.
        rows: Numbers of the rows.
        examples: The examples that were planned.
    """
    documents = [plan.row(row) for row in rows]
    flat = np.concatenate([np.zeros((0, 3), np.int64), *documents])
    sums = zip(examples.weigh(flat).tolist(), examples.supervise(flat).tolist(), strict=True)
    return [
        [Document(index, examples.example(index, *part), RowSums(*next(sums))) for index, *part in row.tolist()]
        for row in documents
    ]


def note_sums(batch: Batch, rows: Sequence[Sequence[Document]], weights: torch.Tensor) -> None:
    """Write into a batch what its rows add to their step, by the plan and by its own tensors.

    Args:
        batch: The micro-batch, in CPU memory.
        rows: Documents of each row.
        weights: The tensor of the batch that the denominator of the step adds up.
    """
    batch["planned"] = functools.reduce(RowSums.plus, (document.planned for row in rows for document in row), RowSums())
    labels = batch["labels"]
    batch["collated"] = RowSums(float(weights.sum(dtype=torch.float64)), int((labels != IGNORE_INDEX).sum()))


class EvaluationLoader:
    """All rows of a plan, once, in order.

    Args:
        plan: The rows.
        topology: How rows are dealt to ranks and micro-batches.
        examples: The examples that were planned.
        collate: Makes a batch of documents.
    """

    def __init__(self, plan: EpochPlan, topology: Topology, examples: Examples, collate: Collate) -> None:
        self._plan = plan
        self._topology = topology
        self._examples = examples
        self._collate = collate

    def __len__(self) -> int:
        """Micro-batches, the same number for every rank."""
        return self._plan.num_micro_batches(self._topology)

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            rows = self._plan.micro_batch(index, self._topology)
            yield self._collate(documents_of(self._plan, rows, self._examples), 1.0)


class TrainLoader:
    """One epoch after the other, continuing where a checkpoint was saved.

    The position is one number, the rows that all ranks together have taken: it means the same for any number of devices
    and any split of the global batch into micro-batches.

    Args:
        plan: Epoch → its plan.
        topology: How rows are dealt to ranks and micro-batches.
        examples: The examples that are planned.
        collate: Makes a batch of documents.
    """

    def __init__(
        self, plan: Callable[[int], EpochPlan], topology: Topology, examples: Examples, collate: Collate
    ) -> None:
        self._plan = plan
        self._topology = topology
        self._examples = examples
        self._collate = collate
        self._epoch = 0
        self._next = 0  # micro-batch of this epoch that comes next

    @property
    def sampler(self) -> TrainLoader:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; a new one starts at its first row."""
        if epoch != self._epoch:
            self._epoch, self._next = epoch, 0

    def __len__(self) -> int:
        """Micro-batches of the epoch, the same number for every rank."""
        return self._plan(self._epoch).num_micro_batches(self._topology)

    def __iter__(self) -> Iterator[Batch]:
        # Lightning makes the iterator before it sets the epoch; a generator reads the epoch only when first asked.
        plan = self._plan(self._epoch)
        while self._next < plan.num_micro_batches(self._topology):
            index = self._next
            self._next += 1
            denominator = plan.step_weight(index // self._topology.accumulate)
            rows = plan.micro_batch(index, self._topology)
            yield self._collate(documents_of(plan, rows, self._examples), denominator)

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, and the rows of it that all ranks together have taken."""
        return {"epoch": self._epoch, "rows": self._next * self._topology.rows_per_micro_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position, from the first row of its optimizer step.

        A checkpoint has no gradients, so a step that was under way is taken again.
        """
        self._epoch = state["epoch"]
        self._next = self._plan(self._epoch).micro_batches_done(state["rows"], self._topology)
