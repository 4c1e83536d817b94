"""Micro-batches of one rank, in the plan's order.

Rows are slices of arrays that are already tokenized, so collating takes microseconds and no worker process is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sft_lightning.data.plan.epoch_plan import EpochPlan, Topology
from sft_lightning.types import Batch

Collate = Callable[[EpochPlan, list[int], float], Batch]
"""(plan, rows, denominator) → Batch."""


class EvaluationLoader:
    """All rows of a plan, once, in order.

    Args:
        plan: The rows.
        topology: How rows are dealt to ranks and micro-batches.
        collate: (plan, rows, denominator) → Batch.
    """

    def __init__(self, plan: EpochPlan, topology: Topology, collate: Collate) -> None:
        self._plan = plan
        self._topology = topology
        self._collate = collate

    def __len__(self) -> int:
        """Micro-batches, for every rank the same."""
        return self._plan.num_micro_batches(self._topology)

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            yield self._collate(self._plan, self._plan.micro_batch(index, self._topology), 1.0)


class TrainLoader:
    """One epoch after the other, continuing wherever a checkpoint left off.

    The position is one number, rows delivered to all ranks together: it means the same for any number of devices and
    any split of the global batch into micro-batches.

    Args:
        plan: Epoch → its plan.
        topology: How rows are dealt to ranks and micro-batches.
        collate: (plan, rows, denominator) → Batch.
    """

    def __init__(self, plan: Callable[[int], EpochPlan], topology: Topology, collate: Collate) -> None:
        self._plan = plan
        self._topology = topology
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
        """Micro-batches of the epoch, for every rank the same."""
        return self._plan(self._epoch).num_micro_batches(self._topology)

    def __iter__(self) -> Iterator[Batch]:
        # Lightning makes the iterator before it sets the epoch; a generator looks at the epoch only when first asked.
        plan = self._plan(self._epoch)
        while self._next < plan.num_micro_batches(self._topology):
            index = self._next
            self._next += 1
            denominator = plan.step_weight(index // self._topology.accumulate)
            yield self._collate(plan, plan.micro_batch(index, self._topology), denominator)

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, and the rows of it that all ranks together have taken."""
        return {"epoch": self._epoch, "rows": self._next * self._topology.rows_per_micro_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position, at the start of the optimizer step that it lies in.

        Gradients of a step that was under way are not in a checkpoint, so that step is taken again from its first row.
        """
        self._epoch = state["epoch"]
        self._next = self._plan(self._epoch).micro_batches_done(state["rows"], self._topology)
