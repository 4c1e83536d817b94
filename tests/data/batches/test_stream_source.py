from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import datasets
import pytest

from sft_lightning.data.batches import stream_source
from sft_lightning.data.batches.stream_source import RECORDS_AT_ONCE, Cursor, SourceStream
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.errors import UserError
from sft_lightning.types import Record


def test_a_source_starts_again_after_its_last_record_and_counts_the_passes(streaming: Any, read: Counter[str]) -> None:
    (stream,) = streaming.streams({"a": 5})
    cursors = [cursor for cursor, _ in islice(stream.examples(), 12)]
    assert cursors[4:7] == [Cursor(0, 4, 1), Cursor(1, 0, 1), Cursor(1, 1, 1)]
    assert stream.report.passes == 2
    assert (stream.report.records, stream.report.examples, stream.report.streaming) == (15, 15, True)
    assert stream.report.length_p50 <= stream.report.length_p90 <= stream.report.longest


@pytest.mark.parametrize("taken", [1, 7, 300, 600])
def test_a_source_continues_after_any_example(taken: int, streaming: Any, read: Counter[str]) -> None:
    (stream,) = streaming.streams({"a": 400})
    examples = list(islice(stream.examples(), taken + 20))
    again = list(islice(stream.examples(examples[taken - 1][0]), 20))
    assert [cursor for cursor, _ in again] == [cursor for cursor, _ in examples[taken:]]
    assert [e.input_ids.tolist() for _, e in again] == [e.input_ids.tolist() for _, e in examples[taken:]]


def test_a_source_continues_between_the_examples_of_one_record(
    streaming: Any, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    render = ExampleBuilder.render
    monkeypatch.setattr(ExampleBuilder, "render", lambda self, *args: render(self, *args) * 3)
    (stream,) = streaming.streams({"a": 4})
    cursors = [cursor for cursor, _ in islice(stream.examples(), 24)]
    assert cursors[:5] == [Cursor(0, 0, 1), Cursor(0, 0, 2), Cursor(0, 0, 3), Cursor(0, 1, 1), Cursor(0, 1, 2)]
    for taken in range(1, 13):
        assert [cursor for cursor, _ in islice(stream.examples(cursors[taken - 1]), 12)] == cursors[taken : taken + 12]


def test_skipped_records_are_not_tokenized(streaming: Any, read: Counter[str]) -> None:
    (stream,) = streaming.streams({"a": 2000})
    next(stream.examples(Cursor(0, 1500, 1)))
    assert stream.report.records == RECORDS_AT_ONCE


def test_drops_are_counted_in_every_pass(streaming: Any, read: Counter[str]) -> None:
    (everything,) = streaming.streams({"a": 50})
    lengths = [len(example.input_ids) for _, example in islice(everything.examples(), 50)]
    limit = sorted(lengths)[30]
    (stream,) = streaming.streams({"a": 50}, replace(streaming.limits, overlong="drop", max_length=limit))
    kept = [len(e.input_ids) for cursor, e in islice(stream.examples(), 50) if cursor.passes == 0]
    assert kept == [length for length in lengths if length <= limit]
    assert stream.report.records == 100
    assert stream.report.dropped["overlong"] == 2 * (50 - len(kept)) > 0


def test_an_overlong_record_is_named(streaming: Any, read: Counter[str]) -> None:
    (stream,) = streaming.streams({"a": 5}, replace(streaming.limits, max_length=8))
    with pytest.raises(UserError, match=r"^a, record \d: \d+ tokens, but data.max_length is 8"):
        next(stream.examples())


def test_a_malformed_record_is_named_or_dropped(streaming: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": "x", "output": "y"}, {"instruction": "x", "output": 3}]
    found = [Record(fields=row, source="a", location=f"a.json, record {i}") for i, row in enumerate(rows)]
    monkeypatch.setattr(stream_source, "read_records", lambda name, config: iter(found))
    with pytest.raises(UserError, match="record 1"):
        list(islice(streaming.streams({"a": 2})[0].examples(), 2))
    (stream,) = streaming.streams({"a": 2}, builder=replace(streaming.builder, malformed="drop"))
    assert [cursor for cursor, _ in islice(stream.examples(), 2)] == [Cursor(0, 0, 1), Cursor(1, 0, 1)]
    assert sum(stream.report.dropped.values()) == 2
    assert next(iter(stream.report.dropped_at.values()))[0] == "a.json, record 1"


def test_a_source_without_any_example_left_is_refused(streaming: Any, read: Counter[str]) -> None:
    (stream,) = streaming.streams({"a": 5}, replace(streaming.limits, max_length=8, overlong="drop"))
    with pytest.raises(UserError, match=r"data.sources.a: no example is left .*'overlong': 5"):
        next(stream.examples())
    with pytest.raises(UserError, match=r"data.sources.b.path: '0' holds no records"):
        streaming.streams({"b": 0})


def test_a_dataset_on_the_hub_is_streamed_and_not_downloaded(streaming: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load_dataset(*args: Any, **options: Any) -> datasets.IterableDataset:
        asked.update(options)
        rows = [{"instruction": f"hub {i}", "output": "y"} for i in range(5)]
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stream = SourceStream("hub", SourceConfig(path="some/set", streaming=True), streaming.builder, streaming.limits)
    examples = [example for _, example in islice(stream.examples(), 10)]
    assert asked["streaming"] is True
    assert streaming.texts([[examples]]) == [f"hub {i % 5}" for i in range(10)]
