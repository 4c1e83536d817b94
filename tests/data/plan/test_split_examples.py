from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_lightning.data.plan.split_examples import (
    JoinedExamples,
    LengthLimits,
    SplitExamples,
    first_tokens,
    select_examples,
)
from sft_lightning.data.tokens.flat_examples import flat_examples
from sft_lightning.data.tokens.store import TokenStore
from sft_lightning.data.tokens.store_cache import Prepared
from sft_lightning.data.tokens.tokenization import TokenizedBatch
from sft_lightning.errors import UserError


def prepared(
    lengths: list[int],
    *,
    prompts: list[int] | None = None,
    records: list[int] | None = None,
    marks: list[int] | None = None,
    codes: tuple[str, ...] = (),
    dropped: tuple[str, ...] = (),
    dropped_at: dict[str, list[tuple[int, str]]] | None = None,
) -> Prepared:
    """A store of examples of these lengths, each a prompt without a loss (default: 1 token), then its answer."""
    weights = [
        float(token >= prompt)
        for length, prompt in zip(lengths, prompts or [1] * len(lengths), strict=True)
        for token in range(length)
    ]
    batch = TokenizedBatch(
        np.arange(sum(lengths), dtype=np.int32), np.array(weights, np.float32), np.array(lengths, np.int64)
    )
    where = np.array(records if records is not None else range(len(lengths)), np.int64)
    all_marks = np.array(marks if marks is not None else [0] * len(lengths), np.uint32)
    store = TokenStore(**vars(flat_examples(batch)), records=where, marks=all_marks)
    facts: dict[str, Any] = {
        "format": "text",
        "codes": list(codes),
        "dropped": list(dropped),
        "dropped_at": dropped_at or {},
        "files": {f"{name}.bin": {"xxh3_128": name} for name in ("input_ids", "loss_weights", "lengths")},
    }
    return Prepared(Path("store"), store, facts, built=False)


def selected(source: Prepared, members: list[bool] | None = None, **limits: Any) -> SplitExamples:
    chosen = np.array(members if members is not None else [True] * source.num_records, bool)
    options = LengthLimits(**{"max_length": 10, **limits})
    return select_examples("toy", "train", source, chosen, options, lambda index: f"f.json, record {index}")


def test_everything_that_fits_is_kept_and_counted() -> None:
    part = selected(prepared([3, 10, 5]))
    assert part.kept.tolist() == [3, 10, 5]
    assert part.indices.tolist() == [0, 1, 2]
    report = part.report
    assert (report.split, report.format, report.records, report.examples) == ("train", "text", 3, 3)
    assert (report.tokens, report.supervised_tokens, report.supervised_tokens_lost) == (18, 15, 0)
    assert (report.dropped, report.truncated, report.repairs) == ({}, 0, {})


def test_only_the_examples_of_the_splits_records_are_in() -> None:
    source = prepared([3, 4, 5, 6], records=[0, 1, 1, 3], marks=[0, 0, 0, 0])
    part = selected(source, [False, True, True, False])
    assert part.kept.tolist() == [0, 4, 5, 0]
    assert (part.report.records, part.report.examples, part.report.tokens) == (2, 2, 9)
    assert part.report.longest == 5


def test_an_overlong_example_is_an_error_that_names_the_record_and_the_length_needed() -> None:
    with pytest.raises(UserError) as error:
        selected(prepared([3, 12, 17, 11], records=[0, 1, 4, 5], marks=[0] * 6))
    assert str(error.value).startswith("f.json, record 4: 17 tokens, but data.max_length is 10")
    assert "3 of 4 examples are longer" in str(error.value)
    assert "Set data.max_length to at least 17, or data.overlong to drop or truncate" in str(error.value)


def test_an_overlong_example_outside_the_split_is_no_error() -> None:
    assert selected(prepared([3, 12]), [True, False]).report.examples == 1


def test_overlong_examples_can_be_dropped() -> None:
    part = selected(prepared([3, 11, 10, 40]), overlong="drop")
    assert part.kept.tolist() == [3, 0, 10, 0]
    assert part.report.dropped == {"overlong": 2}
    assert (part.report.truncated, part.report.supervised_tokens_lost) == (0, 10 + 39)
    assert part.report.longest == 40  # lengths are those before any drop


def test_overlong_examples_can_be_cut_and_the_loss_is_counted() -> None:
    part = selected(prepared([3, 14, 10]), overlong="truncate")
    assert part.kept.tolist() == [3, 10, 10]
    assert (part.report.truncated, part.report.supervised_tokens_lost) == (1, 4)
    assert (part.report.tokens, part.report.supervised_tokens) == (23, 2 + 9 + 9)


def test_an_example_cut_before_its_answer_is_dropped_and_counted() -> None:
    part = selected(prepared([14, 14], prompts=[10, 9]), overlong="truncate")
    assert part.kept.tolist() == [0, 10]
    assert part.report.dropped == {"no_supervised_tokens": 1}
    assert (part.report.truncated, part.report.supervised_tokens_lost) == (2, 4 + 4)


@pytest.mark.parametrize("cuts_examples", [True, False])
def test_an_example_without_supervised_tokens_is_dropped_with_any_packing(cuts_examples: bool) -> None:
    part = selected(prepared([4, 5, 1], prompts=[4, 1, 0]), cuts_examples=cuts_examples)
    assert part.kept.tolist() == [0, 5, 0]
    assert part.report.dropped == {"no_supervised_tokens": 2}


def test_examples_shorter_than_min_length_are_dropped_and_counted() -> None:
    part = selected(prepared([4, 5, 6, 2]), min_length=5)
    assert part.kept.tolist() == [0, 5, 6, 0]
    assert part.report.dropped == {"too_short": 2}
    assert part.report.supervised_tokens_lost == 3 + 1


def test_min_and_max_length_are_both_inclusive() -> None:
    part = selected(prepared([5, 10, 15]), min_length=10, max_length=10, overlong="drop")
    assert part.kept.tolist() == [0, 10, 0]
    assert part.report.dropped == {"too_short": 1, "overlong": 1}


def test_if_packing_cuts_examples_none_is_too_long() -> None:
    part = selected(prepared([40, 3]), cuts_examples=True)
    assert part.kept.tolist() == [40, 3]
    assert (part.report.dropped, part.report.truncated) == ({}, 0)


def test_percentiles_are_lengths_of_examples() -> None:
    report = selected(prepared(list(range(2, 102))), max_length=200).report
    assert (report.length_p50, report.length_p90, report.length_p99, report.longest) == (51, 91, 100, 101)


MARKED = {
    "records": [0, 0, 2, 4],
    "marks": [0b001, 0b010, 0b100, 0b010, 0b100],
    "codes": ("rewritten", "no_answer", "trailing_user"),
    "dropped": ("no_answer",),
    "dropped_at": {"no_answer": [(1, "f.json, record 1"), (3, "f.json, record 3")]},
}


def test_drops_and_repairs_of_records_are_counted_by_reason() -> None:
    report = selected(prepared([3, 4, 5, 6], **MARKED)).report
    assert (report.records, report.examples) == (5, 4)
    assert report.dropped == {"no_answer": 2}
    assert report.dropped_at == {"no_answer": ["f.json, record 1", "f.json, record 3"]}
    assert report.repairs == {"trailing_user": 2}
    assert (report.rewritten_records, report.rewritten_examples) == (1, 2)


def test_drops_and_repairs_of_records_are_counted_by_split() -> None:
    source = prepared([3, 4, 5, 6], **MARKED)
    first = selected(source, [True, True, False, False, False]).report
    assert (first.records, first.dropped, first.repairs) == (2, {"no_answer": 1}, {})
    assert first.dropped_at == {"no_answer": ["f.json, record 1"]}
    assert (first.rewritten_records, first.rewritten_examples) == (1, 2)
    second = selected(source, [False, False, True, False, True]).report
    assert (second.records, second.dropped, second.repairs) == (2, {}, {"trailing_user": 2})
    assert second.dropped_at == {}
    assert (second.rewritten_records, second.rewritten_examples) == (0, 0)


def test_at_most_five_places_are_kept_for_each_reason() -> None:
    places = [(i, f"f.json, record {i}") for i in range(9)]
    source = prepared(
        [], records=[], marks=[1] * 9, codes=("no_answer",), dropped=("no_answer",), dropped_at={"no_answer": places}
    )
    report = selected(source).report
    assert report.dropped == {"no_answer": 9}
    assert report.dropped_at["no_answer"] == [place for _, place in places[:5]]


def test_a_source_without_examples_has_none() -> None:
    part = selected(prepared([]), [])
    assert len(part.indices) == len(part.amounts("tokens")) == part.report.tokens == part.report.longest == 0


def test_amounts_are_in_the_unit_of_the_blend() -> None:
    part = selected(prepared([4, 14, 6], prompts=[1, 5, 2]), [True, True, False], overlong="truncate")
    assert part.amounts("epochs").tolist() == part.amounts("examples").tolist() == [1, 1]
    assert part.amounts("tokens").tolist() == [4, 10]
    assert part.amounts("supervised_tokens").tolist() == [3, 5]


def test_the_content_has_the_checksums_of_tokens_and_weights() -> None:
    assert selected(prepared([3])).content == "input_ids loss_weights lengths"


def test_joined_examples_are_numbered_through_the_sources() -> None:
    one, two = selected(prepared([3, 4])), selected(prepared([5, 12, 2]), overlong="truncate")
    empty = selected(prepared([]), [])
    joined = JoinedExamples([one, empty, two])
    assert joined.kept.tolist() == [3, 4, 5, 10, 2]
    assert joined.firsts.tolist() == [0, 2, 2, 5]
    assert joined.example(1, 0, 4).input_ids.tolist() == [3, 4, 5, 6]
    assert joined.example(2, 1, 3).input_ids.tolist() == [1, 2]
    documents = first_tokens(np.arange(5), joined.kept)
    assert joined.weigh(documents).tolist() == [2, 3, 4, 9, 1]
    assert joined.weigh(documents[[4, 0]]).tolist() == [1, 2]


def test_the_fingerprint_changes_with_the_tokens_their_order_and_how_much_is_kept() -> None:
    one, two = selected(prepared([3, 10, 5])), selected(prepared([4, 4]))
    first = JoinedExamples([one, two]).fingerprint
    assert JoinedExamples([selected(prepared([3, 10, 5])), two]).fingerprint == first
    cut = replace(one, kept=np.minimum(one.kept, 5))
    others = [[cut, two], [two, one], [one], [one, replace(two, content="other")]]
    assert len({first, *(JoinedExamples(each).fingerprint for each in others)}) == 5
