from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sft_lightning.data.batches.loader import LastBatch
from sft_lightning.data.batches.training_rows import PlannedRows, RunLength, StreamedRows
from sft_lightning.data.plan.epoch_plan import EpochExamples, EpochPlan, Topology, plan_epoch
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.errors import UserError


class Planner:
    """Plans epochs of rows of one example; `sizes` are their numbers of rows. Example i was made from record 10 + i."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes
        examples = SimpleNamespace(
            record=lambda example: ("toy", 10 + example),
            example=lambda index, start, stop: (start, stop),
            weigh=lambda documents: np.ones(len(documents)),
            supervise=lambda documents: np.ones(len(documents), np.int64),
        )
        self.blend = SimpleNamespace(repeats=len(set(sizes)) == 1, examples=examples)

    def plan(self, epoch: int) -> EpochPlan:
        ones = np.ones(self.sizes[epoch % len(self.sizes)], np.int64)
        chosen = EpochExamples(np.arange(len(ones)), ones * 0, ones, ones.astype(np.float64))
        return plan_epoch(
            chosen, lambda documents: np.ones(len(documents)),
            packing="none", max_length=1, rows_per_step=4, shuffle=None,
        )  # fmt: skip


SPLIT = Topology(batch_size=2, accumulate=2)
SOURCES = {"toy": SourceConfig(path="toy.jsonl")}


def planned(*sizes: int, **run: Any) -> PlannedRows:
    return PlannedRows(Planner(*sizes), SOURCES, SPLIT, RunLength(**run))  # type: ignore[arg-type]


def streamed(**run: Any) -> StreamedRows:
    return StreamedRows([], DataSpec(sources=SOURCES), "best_fit", SPLIT, RunLength(**run))


@pytest.mark.parametrize(
    ("run", "steps"),
    [
        ({}, 4),
        ({"max_epochs": 3}, 12),
        ({"max_epochs": 3, "max_steps": 5}, 5),
        ({"max_epochs": -1, "max_steps": 50}, 50),
        ({"limit_train_batches": 4}, 2),
        ({"limit_train_batches": 100}, 4),
        ({"max_epochs": 2, "limit_train_batches": 0.6}, 4),
    ],
)
def test_planned_steps_are_those_of_the_epochs_within_the_trainers_limits(run: dict[str, Any], steps: int) -> None:
    assert planned(13, **run).num_optimizer_steps == steps


def test_epochs_of_different_lengths_are_added_up() -> None:
    assert planned(13, 8, max_epochs=3).num_optimizer_steps == 4 + 2 + 4


def test_a_run_without_an_end_is_refused() -> None:
    with pytest.raises(UserError, match=r"^trainer: set max_steps or max_epochs"):
        _ = planned(13, max_epochs=-1).num_optimizer_steps


def test_a_limit_within_an_optimizer_step_is_refused() -> None:
    with pytest.raises(UserError, match=r"^trainer\.limit_train_batches: 3 stops in the middle .* \(2\)"):
        _ = planned(13, limit_train_batches=3).num_optimizer_steps


def test_a_position_counts_complete_steps_and_knows_the_end_of_its_epoch() -> None:
    rows = planned(13, 8)
    assert [rows.micro_batches_done({"epoch": 0, "rows": done}) for done in (0, 3, 4, 12, 13)] == [0, 0, 2, 6, 7]
    assert rows.is_within_epoch({"epoch": 0, "rows": 12})
    assert not rows.is_within_epoch({"epoch": 1, "rows": 8})


def test_the_records_of_a_step_are_named_by_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "toy.jsonl"
    file.write_text('{"text": "x"}\n' * 30)
    rows = PlannedRows(Planner(13), {"toy": SourceConfig(path=str(file))}, SPLIT, RunLength())  # type: ignore[arg-type]
    assert rows.describe(2, limit=2) == [f"{file}, line 15 (toy)", f"{file}, line 16 (toy)", "and 2 more records"]
    assert rows.describe(4) == [f"{file}, line 23 (toy)"]
    assert rows.describe(5) == rows.describe(1)  # of the second epoch


def test_rows_of_single_examples_are_not_packed() -> None:
    assert not planned(13).packs
    assert streamed().packs


def test_a_streamed_run_has_the_trainers_steps() -> None:
    assert streamed(max_epochs=-1, max_steps=7).num_optimizer_steps == 7
    with pytest.raises(UserError, match=r"^trainer\.max_steps: not set"):
        _ = streamed().num_optimizer_steps


def test_a_position_of_a_streamed_run_counts_complete_steps() -> None:
    rows = streamed(max_steps=7)
    assert [rows.micro_batches_done({"rows": done}) for done in (0, 3, 4, 27)] == [0, 0, 2, 12]
    assert rows.is_within_epoch({"rows": 27})
    assert not rows.is_within_epoch({"rows": 28})
    assert rows.describe(3) == ["rows 8 and following of the streamed sources"]


@pytest.mark.parametrize(
    ("number", "within_step", "rows"),
    [
        (0, True, [0, 1, 2, 3]),
        (1, False, [4, 5, 6, 7]),
        (2, True, [4, 5, 6, 7]),
        (5, False, [12]),
        (6, False, [0, 1, 2, 3]),  # the last step has one micro-batch; the second epoch comes next
    ],
)
def test_the_rows_that_come_next_are_those_of_the_step_after_the_last_whole_one(
    number: int, within_step: bool, rows: list[int]
) -> None:
    found = planned(13, max_epochs=2).documents_after(LastBatch(0, number, within_step), None)
    assert [[document.number for document in row] for row in found or []] == [[row] for row in rows]


def test_nothing_comes_after_the_last_epoch() -> None:
    assert planned(13, max_epochs=2).documents_after(LastBatch(1, 6), None) is None
    assert planned(13, max_epochs=-1, max_steps=50).documents_after(LastBatch(1, 6), None)


def test_an_epoch_that_is_limited_ends_at_its_limit() -> None:
    rows = planned(13, max_epochs=2, limit_train_batches=4).documents_after(LastBatch(0, 3), None)
    assert [row[0].number for row in rows or []] == [0, 1, 2, 3]
