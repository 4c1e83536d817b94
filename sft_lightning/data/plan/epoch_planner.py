"""The examples of each epoch → its plan: which examples share a row, which rows an optimizer step."""

from __future__ import annotations

import functools

import numpy as np

from sft_lightning.data.plan.blending import largest_deviation
from sft_lightning.data.plan.epoch_blend import EpochBlend
from sft_lightning.data.plan.epoch_plan import EpochExamples, EpochPlan, Packing, plan_epoch, source_amounts
from sft_lightning.data.plan.split_examples import SplitExamples
from sft_lightning.data.sources.report import DataReport


class EpochPlanner:
    """Plans the epochs of a run.

    Args:
        blend: Chooses the examples of each epoch.
        packing: How examples share rows.
        max_length: Tokens per row.
        rows_per_step: The global batch.
        seed: Seed of the run.
    """

    def __init__(self, blend: EpochBlend, *, packing: Packing, max_length: int, rows_per_step: int, seed: int) -> None:
        self.blend = blend
        self._packing: Packing = packing
        self._max_length = max_length
        self._rows_per_step = rows_per_step
        self._seed = seed

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one planner a data module)
    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of an epoch."""
        return plan_epoch(
            self.blend.epoch_examples(epoch),
            self.blend.examples.weigh,
            packing=self._packing,
            max_length=self._max_length,
            rows_per_step=self._rows_per_step,
            shuffle=(self._seed, epoch),
        )

    def report(self, report: DataReport) -> None:
        """Write into a report what the rows of the first epoch hold, and the share of each source."""
        plan, parts = self.plan(0), self.blend.examples.parts
        tokens = int(plan.rows.lengths.sum())
        report.rows, report.optimizer_steps = plan.num_rows, plan.num_steps
        report.fill = tokens / max(1, plan.num_rows * self._max_length)
        report.blend_unit = self.blend.unit
        amounts = source_amounts(plan.rows, self.blend.all_examples)
        report.largest_deviation = largest_deviation(amounts)
        delivered = np.zeros(len(parts))  # of the last sources too, which may have lost all they had
        delivered[: amounts.shape[1]] = amounts.sum(axis=0) / max(amounts.sum(), 1e-300)
        for part, wanted, share in zip(parts, self.blend.wanted_shares(), delivered.tolist(), strict=True):
            source = report.sources[f"train/{part.name}"]
            source.wanted, source.delivered = wanted, share


def plan_evaluation(part: SplitExamples, *, packing: Packing, max_length: int, rows_per_step: int) -> EpochPlan:
    """Plan every example of one source once, in order.

    Args:
        part: The examples to evaluate on.
        packing: How examples share rows.
        max_length: Tokens per row.
        rows_per_step: Rows that all ranks take together.
    """
    indices, lengths = part.indices, part.kept[part.indices]
    return plan_epoch(
        EpochExamples(indices, np.zeros_like(indices), lengths, lengths.astype(np.float64)),
        part.store.weigh,
        packing=packing,
        max_length=max_length,
        rows_per_step=rows_per_step,
        shuffle=None,
    )
