from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sft_lightning.data.plan.blending import BlendConfig
from sft_lightning.data.plan.epoch_blend import EpochBlend
from sft_lightning.data.plan.epoch_planner import EpochPlanner
from sft_lightning.data.plan.split_examples import SplitExamples
from sft_lightning.data.sources.report import SourceReport
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.tokens.flat_examples import flat_examples
from sft_lightning.data.tokens.store import TokenStore
from sft_lightning.data.tokens.tokenization import TokenizedBatch
from sft_lightning.training.checks.data.coverage import (
    PlannedSource,
    check_coverage,
    check_steps,
    planned_sources,
    unaccounted,
)


def part(name: str, lengths: list[int], dropped: int = 0) -> SplitExamples:
    batch = TokenizedBatch(
        np.zeros(sum(lengths), np.int32), np.ones(sum(lengths), np.float32), np.array(lengths, np.int64)
    )
    number = len(lengths)
    store = TokenStore(**vars(flat_examples(batch)), records=np.arange(number), marks=np.zeros(number, np.uint32))
    report = SourceReport("train", records=number)
    kept = np.array(lengths, np.int64)
    if dropped:
        kept[:dropped] = 0
        report.dropped["overlong"] = dropped
    return SplitExamples(name, store, kept, report, content=name)


PARTS = [part("big", [7, 9, 12, 3, 5, 8, 11, 6, 4, 10], dropped=1), part("small", [10, 4, 5]), part("empty", [8], 1)]


def sources_of(weights: list[float], packing: Any = "best_fit", **options: Any) -> tuple[list[PlannedSource], Any]:
    configs = [SourceConfig(path="x", weight=weight, max_epochs=2.0) for weight in weights]
    blend = BlendConfig(**options)
    chosen = EpochBlend(PARTS, configs, blend, seed=0)
    plan = EpochPlanner(chosen, packing=packing, max_length=16, rows_per_step=2, seed=0).plan(0)
    return planned_sources(plan, PARTS, configs, blend.by), blend


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ([1, 1, 1], {}),
        ([2, 1.5, 1], {}),
        ([0.5, 3, 1], {}),
        ([1, 1, 1], {"temperature": 2.0}),
        ([3, 1, 1], {"by": "examples"}),
        ([3, 1, 1], {"by": "tokens"}),
        ([1, 2, 1], {"by": "supervised_tokens", "temperature": 1.5}),
    ],
)
def test_the_plan_of_any_blend_has_every_example_as_often_as_the_weights_say(
    weights: list[float], options: dict[str, Any], packing: Any
) -> None:
    check = check_coverage(*sources_of(weights, packing, **options))
    assert check.passed, check.figure


def test_an_example_that_is_missing_or_there_twice_or_not_in_the_split_is_found() -> None:
    for index, times in ((5, 0.0), (5, 2.0), (0, 1.0), (5, 0.5)):
        sources, blend = sources_of([1, 1, 1])
        sources[0].times[index] = times
        check = check_coverage(sources, blend)
        assert check.passed is False
        assert "of big" in check.figure or "big has" in check.figure


def test_a_source_that_is_taken_twice_is_found() -> None:
    sources, blend = sources_of([1, 0.5, 1])
    check = check_coverage([sources[0], sources[1]._replace(times=sources[1].times + 1), sources[2]], blend)
    assert check.passed is False
    assert "small" in check.figure


def test_every_record_and_every_example_is_used_or_has_a_reason() -> None:
    assert not [line for each in PARTS for line in unaccounted(each)]
    lost = part("lost", [4, 5])
    lost.kept[0] = 0
    assert unaccounted(lost) == ["source lost: 2 examples, but 1 kept and 0 dropped"]
    lost = part("lost", [4, 5])
    lost.report.records, lost.store.records[1] = 2, 0
    assert unaccounted(lost) == ["source lost: 2 records, but 1 used and 0 dropped"]


@pytest.mark.parametrize(
    ("taken", "stopped", "passed"), [(10, False, True), (9, False, False), (9, True, None), (11, True, False)]
)
def test_a_run_takes_the_planned_steps_unless_it_was_asked_to_stop(
    taken: int, stopped: bool, passed: bool | None
) -> None:
    assert check_steps(taken, 10, stopped=stopped).passed is passed
