"""Every batch holds what the plan says about its rows, and the batches of a step add up to its denominator.

The plan's numbers come from the token store; those of a batch are counted in its labels and weights.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sft_lightning.batch import RowSums
from sft_lightning.checks import Check
from sft_lightning.compat.lightning.loops import is_accumulating
from sft_lightning.training.checks.hooks import RunCheck, is_logging_point, values_of_processes

if TYPE_CHECKING:
    from sft_lightning.training.module import CausalLMModule

ROUNDING = 1e-6
"""Largest relative difference of two sums of the same weights, of which one is in float32."""


class RowsAsPlanned(RunCheck):
    """Compare each batch with the plan as it arrives, and each logged step with its denominator."""

    def __init__(self) -> None:
        self._batches = 0
        self._seconds = 0.0
        self._rows = Check("batches", True, "no batch yet")
        self._step = RowSums()
        self._delivered = RowSums()
        self._starts_within_epoch = False

    def on_train_start(self, module: CausalLMModule) -> None:
        """Note whether a checkpoint's epoch is continued, whose first rows another process has delivered."""
        self._starts_within_epoch = module.trainer.fit_loop.epoch_loop.batch_progress.current.ready > 0

    def on_train_batch_start(self, module: CausalLMModule, batch: Any, index: int) -> None:
        """Compare a batch with the plan; one process stops at once, several at the next logging point."""
        start = time.perf_counter()
        planned, collated = batch["planned"], batch["collated"]
        self._step, self._delivered = self._step.plus(collated), self._delivered.plus(collated)
        self._batches += 1
        if self._rows.passed:
            self._rows = compare_batch(planned, collated, self._batches)
        self._seconds += time.perf_counter() - start
        if not self._rows.passed and module.trainer.world_size == 1:
            module.checks.note(self._rows)

    def on_train_batch_end(self, module: CausalLMModule, batch: Any, index: int) -> None:
        """Add up the batches of a step that is logged."""
        if is_accumulating(module.trainer):
            return
        step, self._step = self._step, RowSums()
        if is_logging_point(module):
            module.checks.note(replace(self._rows, seconds=self._seconds))
            self._seconds = 0.0
            module.checks.run(lambda: compare_step(batch["denominator"], values_of_processes(step.weight)))

    def on_train_epoch_end(self, module: CausalLMModule) -> None:
        """Compare a whole epoch with its plan."""
        delivered, self._delivered = self._delivered, RowSums()
        partial, self._starts_within_epoch = self._starts_within_epoch, False
        data, trainer = module.data, module.trainer
        whole = isinstance(trainer.limit_train_batches, float) and trainer.limit_train_batches == 1.0
        if data.spec.streams or partial or not whole or ends_early(module):
            return
        plan, examples = data.plan(trainer.current_epoch), data.blend.examples
        planned = int(examples.supervise(plan.documents).sum())
        module.checks.run(
            lambda: compare_epoch(planned, sum(each.supervised for each in values_of_processes(delivered)))
        )


def ends_early(module: CausalLMModule) -> bool:
    """Whether the training stops here for another reason than the end of an epoch."""
    trainer = module.trainer
    return trainer.should_stop or trainer.received_sigterm or 0 <= trainer.max_steps <= trainer.global_step


def compare_batch(planned: RowSums, collated: RowSums, number: int) -> Check:
    """Check the sums of a batch's rows.

    Args:
        planned: By the plan.
        collated: In the batch.
        number: The batch's number in this process, from 1.
    """
    passed = planned.supervised == collated.supervised and _equal(planned.weight, collated.weight)
    if passed:
        return Check("batches", True, f"{number:,} batches have the supervised tokens and weights that were planned")
    figure = (
        f"batch {number} has {collated.supervised:,} supervised tokens of weight {collated.weight:g}, but the plan "
        f"says {planned.supervised:,} of weight {planned.weight:g}"
    )
    return Check("batches", False, figure)


def compare_step(denominator: float, weights: list[float]) -> Check:
    """Check that the batches of an optimizer step add up to what its loss is divided by.

    Args:
        denominator: Of the step.
        weights: Supervised weight of the batches of each process.
    """
    total = sum(weights)
    what = f"supervised weight {total:g} over all batches and processes, denominator {denominator:g}"
    return Check("denominator", _equal(denominator, total), what, f"relative difference at most {ROUNDING:.0e}")


def compare_epoch(planned: int, delivered: int) -> Check:
    """Check that an epoch has delivered all supervised tokens.

    Args:
        planned: Supervised tokens of the rows of the plan.
        delivered: Supervised tokens of the batches of all processes.
    """
    return Check("epoch", planned == delivered, f"{delivered:,} of {planned:,} planned supervised tokens delivered")


def _equal(one: float, other: float) -> bool:
    return abs(one - other) <= ROUNDING * max(abs(one), abs(other))
