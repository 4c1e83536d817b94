"""The training rows of a run: the number of its optimizer steps, and what a position among the rows means.

Rows are planned before training, epoch by epoch, or drawn from streams as one epoch that is as long as the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from sft_lightning.data.batches.loader import Collate, Document, LastBatch, TrainLoader, documents_of
from sft_lightning.data.batches.stream_loader import StreamLoader
from sft_lightning.data.batches.stream_source import SourceStream
from sft_lightning.data.batches.stream_windows import StreamWindows
from sft_lightning.data.plan.epoch_plan import Packing, Topology
from sft_lightning.data.plan.epoch_planner import EpochPlanner
from sft_lightning.data.plan.split_reader import Sources
from sft_lightning.data.sources.source import read_record
from sft_lightning.data.spec import DataSpec
from sft_lightning.errors import UserError


class RunLength(NamedTuple):
    """How long the trainer trains; one epoch by default."""

    max_epochs: int | None = 1
    """Epochs; -1: no limit."""

    max_steps: int = -1
    """Optimizer steps; -1: no limit."""

    limit_train_batches: int | float = 1.0
    """Micro-batches of an epoch (integer), or the share of them (float)."""

    @property
    def steps_of_a_stream(self) -> int:
        """Optimizer steps of a run over streamed sources, which have no end.

        Raises:
            UserError: If `trainer.max_steps` is not set.
        """
        if self.max_steps == -1:
            raise UserError(
                "trainer.max_steps: not set, but data.sources are streamed and have no end; set the number of "
                "optimizer steps, or remove `streaming`"
            )
        return self.max_steps


class TrainingRows(Protocol):
    """The training rows of a run.

    A loader's position is a mapping with `epoch` and `rows`: the rows of the epoch that all ranks together have taken.
    """

    @property
    def topology(self) -> Topology:
        """How rows are dealt to ranks and micro-batches."""

    @property
    def packs(self) -> bool:
        """Whether a row may hold more than one document."""

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps of the run."""

    def micro_batches_done(self, position: Mapping[str, int]) -> int:
        """Return the micro-batches of the complete optimizer steps before a position in its epoch."""

    def is_within_epoch(self, position: Mapping[str, int]) -> bool:
        """Whether the epoch of a position has rows after it."""

    def describe(self, optimizer_step: int, limit: int = 8) -> list[str]:
        """Return file and line of the records in the rows of an optimizer step, on all ranks.

        Args:
            optimizer_step: Its number in the run, from 1.
            limit: Places at most; one more entry counts the others.
        """

    def documents_after(self, last: LastBatch, loader: Any) -> list[list[Document]] | None:
        """Return the rows of the optimizer step that comes next, over all ranks; not by the loader's own position.

        Args:
            last: The micro-batch that was trained on last.
            loader: The loader that it came from.

        Returns:
            The documents of each row; `None` if the run ends before that step, or its rows are not known yet.
        """

    def loader(self, collate: Collate) -> TrainLoader | StreamLoader:
        """Return this rank's micro-batches."""


@dataclass(frozen=True)
class PlannedRows:
    """Rows that are known before training."""

    planner: EpochPlanner
    """Plans the epochs."""

    sources: Sources
    """The training sources."""

    topology: Topology
    """How rows are dealt to ranks and micro-batches."""

    run: RunLength
    """How long the trainer trains."""

    @property
    def packs(self) -> bool:
        """Whether any row of the first epoch holds more than one document."""
        plan = self.planner.plan(0)
        return len(plan.documents) > plan.num_rows

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps of the run, from the plan and the trainer's limits.

        Raises:
            UserError: If the run has no end, or an epoch ends within an optimizer step.
        """
        max_epochs, max_steps, _ = self.run
        if max_epochs == -1:
            if max_steps == -1:
                raise UserError("trainer: set max_steps or max_epochs; the learning-rate schedule needs an end")
            return max_steps
        num_epochs = max_epochs or 1
        if self.planner.blend.repeats:
            steps = num_epochs * self._steps_of(0)
        else:  # each epoch has another part of a source, which may fill another number of rows
            steps = sum(self._steps_of(epoch) for epoch in range(num_epochs))
        return steps if max_steps == -1 else min(steps, max_steps)

    def _steps_of(self, epoch: int) -> int:
        return math.ceil(self._micro_batches_of(epoch) / self.topology.accumulate)

    def _micro_batches_of(self, epoch: int) -> int:
        """Return the micro-batches of an epoch within `trainer.limit_train_batches`, which must not cut a step."""
        whole, limit = self.planner.plan(epoch).num_micro_batches(self.topology), self.run.limit_train_batches
        limited = min(whole, limit) if isinstance(limit, int) else int(whole * limit)
        if limited < whole and limited % self.topology.accumulate:
            raise UserError(
                f"trainer.limit_train_batches: {limit} stops in the middle of an optimizer step; "
                f"use a multiple of accumulate_grad_batches ({self.topology.accumulate})"
            )
        return limited

    def micro_batches_done(self, position: Mapping[str, int]) -> int:
        """Return the micro-batches of the complete optimizer steps before a position in its epoch."""
        return self.planner.plan(position["epoch"]).micro_batches_done(position["rows"], self.topology)

    def is_within_epoch(self, position: Mapping[str, int]) -> bool:
        """Whether the epoch of a position has rows after it."""
        return position["rows"] < self.planner.plan(position["epoch"]).num_rows

    def describe(self, optimizer_step: int, limit: int = 8) -> list[str]:
        """Return file and line of the records in the rows of an optimizer step, on all ranks.

        Args:
            optimizer_step: Its number in the run, from 1.
            limit: Places at most; one more entry counts the others.
        """
        epoch, step = 0, optimizer_step - 1
        while step >= self._steps_of(epoch):
            step -= self._steps_of(epoch)
            epoch += 1
        plan, size = self.planner.plan(epoch), self.topology.rows_per_step
        rows = range(step * size, min((step + 1) * size, plan.num_rows))
        examples = dict.fromkeys(int(document[0]) for row in rows for document in plan.row(row))
        found = list(dict.fromkeys(self.planner.blend.examples.record(example) for example in examples))
        places = [f"{read_record(name, self.sources[name], index).location} ({name})" for name, index in found[:limit]]
        return places if len(found) <= limit else [*places, f"and {len(found) - limit} more records"]

    def documents_after(self, last: LastBatch, loader: Any) -> list[list[Document]] | None:
        """Return the rows of the optimizer step that comes next, over all ranks; not by the loader's own position.

        Args:
            last: The micro-batch that was trained on last.
            loader: Not used: the plan is known.

        Returns:
            The documents of each row; `None` if no epoch comes next.
        """
        epoch, step = last.epoch, last.step_after(self.topology.accumulate)
        if not last.within_step and last.number + 1 >= self._micro_batches_of(epoch):
            epoch, step = epoch + 1, 0
            if epoch == (self.run.max_epochs or 1):
                return None
        plan, size = self.planner.plan(epoch), self.topology.rows_per_step
        rows = range(step * size, min((step + 1) * size, plan.num_rows))
        return documents_of(plan, rows, self.planner.blend.examples)

    def loader(self, collate: Collate) -> TrainLoader:
        """Return this rank's micro-batches, epoch after epoch."""
        return TrainLoader(self.planner.plan, self.topology, self.planner.blend.examples, collate)


@dataclass(frozen=True)
class StreamedRows:
    """Rows that are drawn from the sources while training."""

    streams: Sequence[SourceStream]
    """The training sources, opened."""

    spec: DataSpec
    """The YAML's keys under `data`."""

    packing: Packing
    """How examples share rows."""

    topology: Topology
    """How rows are dealt to ranks and micro-batches."""

    run: RunLength
    """How long the trainer trains."""

    @property
    def packs(self) -> bool:
        """Whether a row may hold more than one document."""
        return self.packing != "none"

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps of the run: `trainer.max_steps`, since a stream has no end.

        Raises:
            UserError: If it is not set.
        """
        return self.run.steps_of_a_stream

    def micro_batches_done(self, position: Mapping[str, int]) -> int:
        """Return the micro-batches of the complete optimizer steps before a position in the run."""
        return position["rows"] // self.topology.rows_per_step * self.topology.accumulate

    def is_within_epoch(self, position: Mapping[str, int]) -> bool:
        """Whether the run has rows after a position."""
        return position["rows"] < self.num_optimizer_steps * self.topology.rows_per_step

    def describe(self, optimizer_step: int, limit: int = 8) -> list[str]:
        """Return which rows of the run an optimizer step has; file and line of their records are not kept.

        Args:
            optimizer_step: Its number in the run, from 1.
            limit: Not used: there is one entry.
        """
        return [f"rows {(optimizer_step - 1) * self.topology.rows_per_step} and following of the streamed sources"]

    def documents_after(self, last: LastBatch, loader: Any) -> list[list[Document]] | None:
        """Return the rows of the optimizer step that comes next, over all ranks; not by the loader's own position.

        Args:
            last: The micro-batch that was trained on last.
            loader: The loader that it came from.

        Returns:
            The documents of each row; `None` after the last step.
        """
        found: list[list[Document]] | None = loader.documents_of_step(last.step_after(self.topology.accumulate))
        return found

    def loader(self, collate: Collate) -> StreamLoader:
        """Return this rank's micro-batches of the whole run.

        Raises:
            UserError: If `trainer.limit_train_batches` would end the run.
        """
        windows = StreamWindows(
            self.streams,
            self.spec.blend,
            packing=self.packing,
            max_length=self.spec.max_length,
            rows_per_step=self.topology.rows_per_step,
            seed=self.spec.seed,
        )
        loader = StreamLoader(windows, self.topology, collate, self.num_optimizer_steps)
        limit = self.run.limit_train_batches
        if limit != 1.0 and not (isinstance(limit, int) and limit >= len(loader)):
            raise UserError(
                f"trainer.limit_train_batches: not available with streamed sources (got {limit}); use trainer.max_steps"
            )
        return loader
