from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from sft_lightning.data.batches.stream_windows import rows_per_window


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_every_record_is_seen_once_before_any_is_seen_twice(packing: Any, streaming: Any, read: Counter[str]) -> None:
    limits = streaming.limits_of(packing, 256)
    windows = streaming.windows(streaming.streams({"a": 150}, limits), packing, max_length=256)
    loader = streaming.loader(windows, 100)
    seen = streaming.texts(streaming.steps(loader))
    counts = Counter(seen)
    passes = len(seen) / 150
    assert set(counts) == {f"a {i}" for i in range(150)}
    # A window shuffles, so the examples of one window may be of two passes.
    assert min(counts.values()) >= int(passes) - 1
    assert max(counts.values()) <= int(passes) + 2


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_every_example_taken_is_trained_on_or_carried_to_the_next_window(
    packing: Any, streaming: Any, read: Counter[str]
) -> None:
    limits = streaming.limits_of(packing, 256)
    windows = streaming.windows(streaming.streams({"a": 10_000}, limits), packing, max_length=256)
    trained = Counter(example.input_ids.tobytes() for example in streaming.documents(windows, 6))
    position = windows.position()["carried"]
    trained.update(ids.numpy().tobytes() for ids in position["input_ids"].split(position["lengths"].tolist()))
    taken = streaming.taken(windows, limits)
    assert trained == Counter(example.input_ids.tobytes() for example in taken)
    assert len(trained) == len(taken) >= 6 * streaming.rows_per_window


def test_concat_cuts_between_windows_and_loses_no_token(streaming: Any, read: Counter[str]) -> None:
    limits = streaming.limits_of("concat")
    windows = streaming.windows(streaming.streams({"a": 10_000}, limits), "concat")
    trained: Counter[int] = Counter()
    for document in streaming.documents(windows, 6):
        trained.update(document.input_ids.tolist())
    trained.update(windows.position()["carried"]["input_ids"].tolist())
    taken: Counter[int] = Counter()
    for example in streaming.taken(windows, limits):
        taken.update(example.input_ids.tolist())
    assert trained == taken


@pytest.mark.parametrize("packing", ["best_fit", "none", "concat"])
def test_every_step_has_its_rows_and_no_row_is_too_long(packing: Any, streaming: Any, read: Counter[str]) -> None:
    streams = streaming.streams({"a": 300, "b": 200}, streaming.limits_of(packing))
    steps = streaming.steps(streaming.loader(streaming.windows(streams, packing), 30))
    assert len(steps) == 30
    assert {len(step) for step in steps} == {streaming.rows_per_step}
    lengths = [sum(len(document.input_ids) for document in row) for step in steps for row in step]
    assert max(lengths) <= 128
    if packing == "concat":
        assert set(lengths) == {128}


def test_the_denominator_is_the_supervised_weight_of_the_step(streaming: Any, read: Counter[str]) -> None:
    for rows, denominator in streaming.loader(streaming.windows(streaming.streams({"a": 300})), 12):
        weights = [document.loss_weights[1:].sum() for row in rows for document in row]
        assert denominator == pytest.approx(sum(weights))


@pytest.mark.parametrize("by", ["epochs", "tokens", "supervised_tokens", "examples"])
def test_every_prefix_has_the_share_of_each_source(by: Any, streaming: Any, read: Counter[str]) -> None:
    streams = streaming.streams({"a": 5000, "b": 5000, "c": 50}, b=3.0, c=0.5)
    had = dict.fromkeys("abc", 0.0)
    largest = 0.0
    for step in streaming.steps(streaming.loader(streaming.windows(streams, by=by), 40)):
        for row in step:
            amounts = dict.fromkeys("abc", 0.0)
            for document in row:
                amount = {"examples": 1, "supervised_tokens": int((document.loss_weights[1:] > 0).sum())}
                amounts[streaming.texts([[[document]]])[0][0]] += amount.get(by, len(document.input_ids))
            largest = max(largest, sum(amounts.values()))
            had = {name: had[name] + amounts[name] for name in had}
            for name, share in {"a": 1 / 4.5, "b": 3 / 4.5, "c": 0.5 / 4.5}.items():
                # A row within a window, and what is carried from one window to the next.
                assert abs(had[name] - share * sum(had.values())) <= largest * (streaming.rows_per_step - 1)
    assert had["a"] / sum(had.values()) == pytest.approx(1 / 4.5, abs=0.03)
    assert [stream.report.wanted for stream in streams] == pytest.approx([1 / 4.5, 3 / 4.5, 0.5 / 4.5])
    assert [stream.report.delivered for stream in streams] == pytest.approx([1 / 4.5, 3 / 4.5, 0.5 / 4.5], abs=0.01)


def test_a_window_is_bounded_in_tokens() -> None:
    assert rows_per_window(1, 2048) == 1024
    assert rows_per_window(128, 2048) == 2048
    assert rows_per_window(3, 2048) == 1026
    assert rows_per_window(8, 131072) == 128
    assert rows_per_window(64, 131072) == 256


def test_the_order_depends_on_the_seed(streaming: Any, read: Counter[str]) -> None:
    def first(seed: int) -> Any:
        windows = streaming.windows(streaming.streams({"a": 300}), seed=seed)
        return streaming.ids(streaming.steps(streaming.loader(windows, 4)))

    assert first(0) == first(0)
    assert first(0) != first(1)


def test_an_example_longer_than_a_window_is_cut_into_rows(streaming: Any, read: Counter[str]) -> None:
    streams = streaming.streams({"a": 9}, streaming.limits_of("concat", 2))
    steps = streaming.steps(streaming.loader(streaming.windows(streams, "concat", max_length=2), 40))
    assert {sum(len(document.input_ids) for document in row) for step in steps for row in step} == {2}


def test_a_window_keeps_ids_and_weights(streaming: Any, read: Counter[str]) -> None:
    (stream,) = streaming.streams({"a": 30})
    window = streaming.windows([stream]).next_window()
    for index, (_, example) in zip(range(len(window.examples)), stream.examples(), strict=False):
        kept = window.examples.example(index, 0, int(window.examples.lengths[index]))
        assert np.array_equal(kept.input_ids, example.input_ids)
        assert np.array_equal(kept.loss_weights, example.loss_weights)
