from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sft_lightning.data.batches.loader import Document, EvaluationLoader, TrainLoader
from sft_lightning.data.plan.epoch_plan import EpochExamples, EpochPlan, Topology, plan_epoch
from sft_lightning.types import TokenizedExample


def plan(epoch: int, rows: int = 13, rows_per_step: int = 4) -> EpochPlan:
    chosen = EpochExamples(np.arange(rows), np.zeros(rows, np.int64), np.ones(rows, np.int64), np.ones(rows))
    return plan_epoch(
        chosen, lambda documents: np.ones(len(documents)),
        packing="none", max_length=1, rows_per_step=rows_per_step, shuffle=(0, epoch),
    )  # fmt: skip


class Numbered:
    """Examples whose only token is their number."""

    def example(self, index: int, start: int, stop: int) -> TokenizedExample:
        assert (start, stop) == (0, 1)
        return TokenizedExample(np.array([index], np.int32), np.ones(1, np.float32))

    def weigh(self, documents: Any) -> Any:
        return np.full(len(documents), 0.5)

    def supervise(self, documents: Any) -> Any:
        return np.ones(len(documents), np.int64)


def collate(rows: Sequence[Sequence[Document]], denominator: float) -> Any:
    """Collate to the number of each row's example."""
    assert all(document.number == document.tokens.input_ids[0] for row in rows for document in row)
    return [document.number for row in rows for document in row], denominator


def train_loader(batch_size: int = 2, accumulate: int = 2) -> TrainLoader:
    return TrainLoader(plan, Topology(batch_size=batch_size, accumulate=accumulate), Numbered(), collate)


def test_an_epoch_has_every_row_once_in_the_order_of_the_plan() -> None:
    batches = list(train_loader())
    assert [i for rows, _ in batches for i in rows] == plan(0).documents[:, 0].tolist()
    assert len(batches) == len(train_loader()) == 7


def test_each_micro_batch_has_the_denominator_of_its_step() -> None:
    assert [denominator for _, denominator in train_loader()] == [4, 4, 4, 4, 4, 4, 1]


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_a_position_continues_at_the_next_row_for_any_split_of_the_global_batch(
    batch_size: int, accumulate: int
) -> None:
    first = train_loader()
    iterator = iter(first)
    taken = [i for _ in range(4) for i in next(iterator)[0]]
    second = train_loader(batch_size, accumulate)
    second.load_state_dict(first.state_dict())
    assert taken + [i for rows, _ in second for i in rows] == plan(0).documents[:, 0].tolist()


def test_a_position_within_a_step_continues_at_its_first_row() -> None:
    first = train_loader()
    next(iter(first))
    second = train_loader()
    second.load_state_dict(first.state_dict())
    assert next(iter(second))[0] == plan(0).documents[:, 0].tolist()[:2]


def test_a_new_epoch_starts_at_its_first_row_in_another_order() -> None:
    loader = train_loader()
    list(loader)
    loader.sampler.set_epoch(1)
    assert [i for rows, _ in loader for i in rows] == plan(1).documents[:, 0].tolist()
    assert plan(1).documents[:, 0].tolist() != plan(0).documents[:, 0].tolist()


def test_evaluation_starts_over_each_time() -> None:
    loader = EvaluationLoader(plan(0), Topology(batch_size=4), Numbered(), collate)
    assert [rows for rows, _ in loader] == [rows for rows, _ in loader]
    assert len(loader) == 4
