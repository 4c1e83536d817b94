from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sft_lightning.cli.commands.prepare import prepare
from sft_lightning.data.batches import stream_source, streaming
from sft_lightning.data.batches.stream_source import RECORDS_AT_ONCE, Cursor, SourceStream
from sft_lightning.data.batches.streaming import StreamLoader, StreamWindows, Window, rows_per_window
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.plan.blending import BlendConfig
from sft_lightning.data.plan.epoch_plan import EpochPlan, Packing, Topology
from sft_lightning.data.plan.split_examples import LengthLimits
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.data.templates.binding import bind_template
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.errors import UserError
from sft_lightning.types import Record, TokenizedExample

LIMITS = LengthLimits(max_length=128)
ROWS_PER_STEP = 4
WINDOW = 16
"""Rows of a window in these tests."""


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        streaming, "rows_per_window", lambda rows_per_step, _: -(-WINDOW // rows_per_step) * rows_per_step
    )


@pytest.fixture
def builder(tokenizer: PreTrainedTokenizerFast) -> ExampleBuilder:
    return ExampleBuilder(tokenizer=tokenizer, template=bind_template("alpaca", tokenizer), loss_on="assistant")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Sources without files: `path` says how many records there are; counts the records read of each."""
    counts: Counter[str] = Counter()

    def records(name: str, config: SourceConfig) -> Iterator[Record]:
        for i in range(int(config.path)):
            counts[name] += 1
            fields = {"instruction": f"{name} {i}", "output": f"{i}" + "." * (i * 7 % 23)}
            yield Record(fields=fields, source=name, location=f"{name}, record {i}")

    monkeypatch.setattr(stream_source, "read_records", records)
    return counts


Streams = list[SourceStream]


def streams_of(
    builder: ExampleBuilder, sizes: dict[str, int], limits: LengthLimits = LIMITS, **weights: float
) -> Streams:
    return [
        SourceStream(name, SourceConfig(path=str(size), weight=weights.get(name, 1.0)), builder, limits)
        for name, size in sizes.items()
    ]


def limits_of(packing: Packing, max_length: int = 128) -> LengthLimits:
    return LengthLimits(max_length=max_length, cuts_examples=packing == "concat")


def windows_of(streams: Streams, packing: Packing = "best_fit", **changes: Any) -> StreamWindows:
    options = {"max_length": 128, "rows_per_step": ROWS_PER_STEP, "seed": 0, **changes}
    return StreamWindows(streams, BlendConfig(by=options.pop("by", "epochs")), packing=packing, **options)


Row = list[TokenizedExample]


def rows_of(window: Window) -> Callable[[EpochPlan, list[int], float], Any]:
    """Collate to the documents themselves."""
    return lambda plan, rows, denominator: (
        [[window.store.example(*document) for document in plan.row(row).tolist()] for row in rows],
        denominator,
    )


def loader_of(windows: StreamWindows, num_steps: int, topology: Topology | None = None) -> StreamLoader:
    return StreamLoader(windows, topology or Topology(batch_size=ROWS_PER_STEP), rows_of, num_steps)


def steps_of(loader: StreamLoader) -> list[list[Row]]:
    return [rows for rows, _ in loader]


def ids(steps: list[list[Row]]) -> list[Any]:
    return [[[document.input_ids.tolist() for document in row] for row in step] for step in steps]


def texts(steps: list[list[Row]], builder: ExampleBuilder) -> list[str]:
    """The instruction of each example, in the order of training."""
    decoded = [builder.tokenizer.decode(document.input_ids) for step in steps for row in step for document in row]
    return [text.partition("Instruction:\n")[2].partition("\n")[0] for text in decoded]


# --- a source -------------------------------------------------------------------------------------------------------


def test_a_source_starts_again_after_its_last_record_and_counts_its_passes(
    builder: ExampleBuilder, read: Counter[str]
) -> None:
    (stream,) = streams_of(builder, {"a": 5})
    cursors = [cursor for cursor, _ in islice(stream.examples(), 12)]
    assert cursors[4:7] == [Cursor(0, 4, 1), Cursor(1, 0, 1), Cursor(1, 1, 1)]
    assert stream.report.passes == 2
    assert (stream.report.records, stream.report.examples, stream.report.streaming) == (15, 15, True)
    assert stream.report.length_p50 <= stream.report.length_p90 <= stream.report.longest


@pytest.mark.parametrize("taken", [1, 7, 300, 600])
def test_a_source_continues_behind_any_example(taken: int, builder: ExampleBuilder, read: Counter[str]) -> None:
    (stream,) = streams_of(builder, {"a": 400})
    examples = list(islice(stream.examples(), taken + 20))
    again = list(islice(stream.examples(examples[taken - 1][0]), 20))
    assert [cursor for cursor, _ in again] == [cursor for cursor, _ in examples[taken:]]
    assert [e.input_ids.tolist() for _, e in again] == [e.input_ids.tolist() for _, e in examples[taken:]]


def test_a_source_continues_between_the_examples_of_one_record(
    builder: ExampleBuilder, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    render = ExampleBuilder.render
    monkeypatch.setattr(ExampleBuilder, "render", lambda self, *args: render(self, *args) * 3)
    (stream,) = streams_of(builder, {"a": 4})
    cursors = [cursor for cursor, _ in islice(stream.examples(), 24)]
    assert cursors[:5] == [Cursor(0, 0, 1), Cursor(0, 0, 2), Cursor(0, 0, 3), Cursor(0, 1, 1), Cursor(0, 1, 2)]
    for taken in range(1, 13):
        assert [cursor for cursor, _ in islice(stream.examples(cursors[taken - 1]), 12)] == cursors[taken : taken + 12]


def test_what_is_skipped_is_not_tokenized(builder: ExampleBuilder, read: Counter[str]) -> None:
    (stream,) = streams_of(builder, {"a": 2000})
    next(stream.examples(Cursor(0, 1500, 1)))
    assert stream.report.records == RECORDS_AT_ONCE


def test_drops_are_counted_as_in_a_store(builder: ExampleBuilder, read: Counter[str]) -> None:
    (everything,) = streams_of(builder, {"a": 50})
    lengths = [len(example.input_ids) for _, example in islice(everything.examples(), 50)]
    limit = sorted(lengths)[30]
    (stream,) = streams_of(builder, {"a": 50}, replace(LIMITS, overlong="drop", max_length=limit))
    kept = [len(e.input_ids) for cursor, e in islice(stream.examples(), 50) if cursor.passes == 0]
    assert kept == [length for length in lengths if length <= limit]
    assert stream.report.records == 100
    assert stream.report.dropped["overlong"] == 2 * (50 - len(kept)) > 0


def test_an_overlong_record_is_named(builder: ExampleBuilder, read: Counter[str]) -> None:
    (stream,) = streams_of(builder, {"a": 5}, replace(LIMITS, max_length=8))
    with pytest.raises(UserError, match=r"^a, record \d: \d+ tokens, but data.max_length is 8"):
        next(stream.examples())


def test_a_malformed_record_is_named_or_dropped(builder: ExampleBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": "x", "output": "y"}, {"instruction": "x", "output": 3}]
    found = [Record(fields=row, source="a", location=f"a.json, record {i}") for i, row in enumerate(rows)]
    monkeypatch.setattr(stream_source, "read_records", lambda name, config: iter(found))
    with pytest.raises(UserError, match="record 1"):
        list(islice(streams_of(builder, {"a": 2})[0].examples(), 2))
    (stream,) = streams_of(replace(builder, malformed="drop"), {"a": 2})
    assert [cursor for cursor, _ in islice(stream.examples(), 2)] == [Cursor(0, 0, 1), Cursor(1, 0, 1)]
    assert sum(stream.report.dropped.values()) == 2
    assert next(iter(stream.report.dropped_at.values()))[0] == "a.json, record 1"


def test_a_source_that_leaves_no_example_does_not_run_for_ever(builder: ExampleBuilder, read: Counter[str]) -> None:
    (stream,) = streams_of(builder, {"a": 5}, replace(LIMITS, max_length=8, overlong="drop"))
    with pytest.raises(UserError, match=r"data.sources.a: no example is left .*'overlong': 5"):
        next(stream.examples())
    with pytest.raises(UserError, match=r"data.sources.b.path: '0' holds no records"):
        streams_of(builder, {"b": 0})


def documents_of(windows: StreamWindows, num_windows: int) -> Row:
    """The documents of all steps of the next windows."""
    made = [windows.next_window() for _ in range(num_windows)]
    return [
        window.store.example(*document)
        for window in made
        for row in range(window.num_steps * ROWS_PER_STEP)
        for document in window.plan.row(row).tolist()
    ]


def taken_by(windows: StreamWindows, builder: ExampleBuilder, limits: LengthLimits) -> Row:
    """The examples up to where the first source stands."""
    (cursor,) = windows.position()["cursors"]
    taken = []
    for reached, example in streams_of(builder, {"a": 10_000}, limits)[0].examples():
        taken.append(example)
        if reached == cursor:
            break
    return taken


def test_a_data_set_on_the_hub_is_streamed_and_not_downloaded(
    builder: ExampleBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def load_dataset(*args: Any, **options: Any) -> datasets.IterableDataset:
        asked.update(options)
        rows = [{"instruction": f"hub {i}", "output": "y"} for i in range(5)]
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stream = SourceStream("hub", SourceConfig(path="some/set", streaming=True), builder, LIMITS)
    examples = [example for _, example in islice(stream.examples(), 10)]
    assert asked["streaming"] is True
    assert texts([[examples]], builder) == [f"hub {i % 5}" for i in range(10)]


# --- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_every_record_is_seen_once_before_any_is_seen_twice(
    packing: Any, builder: ExampleBuilder, read: Counter[str]
) -> None:
    limits = limits_of(packing, 256)
    windows = windows_of(streams_of(builder, {"a": 150}, limits), packing, max_length=256)
    loader = loader_of(windows, 100)
    seen = texts(steps_of(loader), builder)
    counts = Counter(seen)
    passes = len(seen) / 150
    assert set(counts) == {f"a {i}" for i in range(150)}
    # A window shuffles, so the examples of one window may be of two passes.
    assert min(counts.values()) >= int(passes) - 1
    assert max(counts.values()) <= int(passes) + 2


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_what_windows_took_is_what_was_trained_and_what_is_carried(
    packing: Any, builder: ExampleBuilder, read: Counter[str]
) -> None:
    limits = limits_of(packing, 256)
    windows = windows_of(streams_of(builder, {"a": 10_000}, limits), packing, max_length=256)
    trained = Counter(example.input_ids.tobytes() for example in documents_of(windows, 6))
    position = windows.position()["carried"]
    trained.update(ids.numpy().tobytes() for ids in position["input_ids"].split(position["lengths"].tolist()))
    taken = taken_by(windows, builder, limits)
    assert trained == Counter(example.input_ids.tobytes() for example in taken)
    assert len(trained) == len(taken) >= 6 * WINDOW


def test_concat_cuts_between_windows_and_loses_no_token(builder: ExampleBuilder, read: Counter[str]) -> None:
    limits = limits_of("concat")
    windows = windows_of(streams_of(builder, {"a": 10_000}, limits), "concat")
    trained: Counter[int] = Counter()
    for document in documents_of(windows, 6):
        trained.update(document.input_ids.tolist())
    trained.update(windows.position()["carried"]["input_ids"].tolist())
    taken: Counter[int] = Counter()
    for example in taken_by(windows, builder, limits):
        taken.update(example.input_ids.tolist())
    assert trained == taken


@pytest.mark.parametrize("packing", ["best_fit", "none", "concat"])
def test_every_step_has_its_rows_and_no_row_is_too_long(
    packing: Any, builder: ExampleBuilder, read: Counter[str]
) -> None:
    streams = streams_of(builder, {"a": 300, "b": 200}, limits_of(packing))
    steps = steps_of(loader_of(windows_of(streams, packing), 30))
    assert len(steps) == 30
    assert {len(step) for step in steps} == {ROWS_PER_STEP}
    lengths = [sum(len(document.input_ids) for document in row) for step in steps for row in step]
    assert max(lengths) <= 128
    if packing == "concat":
        assert set(lengths) == {128}


def test_the_denominator_is_the_supervised_weight_of_the_step(builder: ExampleBuilder, read: Counter[str]) -> None:
    for rows, denominator in loader_of(windows_of(streams_of(builder, {"a": 300})), 12):
        weights = [document.loss_weights[1:].sum() for row in rows for document in row]
        assert denominator == pytest.approx(sum(weights))


@pytest.mark.parametrize("by", ["epochs", "tokens", "supervised_tokens", "examples"])
def test_sources_have_their_shares_at_every_prefix(by: Any, builder: ExampleBuilder, read: Counter[str]) -> None:
    streams = streams_of(builder, {"a": 5000, "b": 5000, "c": 50}, b=3.0, c=0.5)
    had = dict.fromkeys("abc", 0.0)
    largest = 0.0
    for step in steps_of(loader_of(windows_of(streams, by=by), 40)):
        for row in step:
            amounts = dict.fromkeys("abc", 0.0)
            for document in row:
                amount = {"examples": 1, "supervised_tokens": int((document.loss_weights[1:] > 0).sum())}
                amounts[texts([[[document]]], builder)[0][0]] += amount.get(by, len(document.input_ids))
            largest = max(largest, sum(amounts.values()))
            had = {name: had[name] + amounts[name] for name in had}
            for name, share in {"a": 1 / 4.5, "b": 3 / 4.5, "c": 0.5 / 4.5}.items():
                # A row within a window, and what is carried from one window to the next.
                assert abs(had[name] - share * sum(had.values())) <= largest * (ROWS_PER_STEP - 1)
    assert had["a"] / sum(had.values()) == pytest.approx(1 / 4.5, abs=0.03)
    assert [stream.report.wanted for stream in streams] == pytest.approx([1 / 4.5, 3 / 4.5, 0.5 / 4.5])
    assert [stream.report.delivered for stream in streams] == pytest.approx([1 / 4.5, 3 / 4.5, 0.5 / 4.5], abs=0.01)


def test_memory_is_bounded_by_windows(builder: ExampleBuilder, read: Counter[str]) -> None:
    loader = loader_of(windows_of(streams_of(builder, {"a": 100_000}), "none"), 500)
    trained = 0
    for rows, _ in islice(loader, 300):
        trained += len(rows)
        # The window under way, the one after it, what is tokenized together, and the record that told the format.
        assert read["a"] <= trained + 2 * WINDOW + RECORDS_AT_ONCE + 1
    assert trained == 300 * ROWS_PER_STEP


def test_no_window_is_made_for_steps_that_are_not_taken(builder: ExampleBuilder, read: Counter[str]) -> None:
    windows = windows_of(streams_of(builder, {"a": 100_000}))
    loader = loader_of(windows, 2)
    assert len(list(loader)) == 2
    assert windows.position()["window"] == 1


def test_a_window_is_bounded_in_tokens() -> None:
    assert rows_per_window(1, 2048) == 1024
    assert rows_per_window(128, 2048) == 2048
    assert rows_per_window(3, 2048) == 1026
    assert rows_per_window(8, 131072) == 128
    assert rows_per_window(64, 131072) == 256


def test_the_order_is_of_the_seed(builder: ExampleBuilder, read: Counter[str]) -> None:
    def first(seed: int) -> Any:
        windows = windows_of(streams_of(builder, {"a": 300}), seed=seed)
        return ids(steps_of(loader_of(windows, 4)))

    assert first(0) == first(0)
    assert first(0) != first(1)


def test_an_example_longer_than_a_window_is_cut_into_rows(builder: ExampleBuilder, read: Counter[str]) -> None:
    streams = streams_of(builder, {"a": 9}, limits_of("concat", 2))
    steps = steps_of(loader_of(windows_of(streams, "concat", max_length=2), 40))
    assert {sum(len(document.input_ids) for document in row) for step in steps for row in step} == {2}


# --- ranks ----------------------------------------------------------------------------------------------------------


def test_ranks_take_disjoint_rows_that_together_are_the_step(builder: ExampleBuilder, read: Counter[str]) -> None:
    def batches(rank: int, world_size: int, batch_size: int, accumulate: int) -> list[list[Row]]:
        topology = Topology(batch_size=batch_size, accumulate=accumulate, world_size=world_size, rank=rank)
        windows = windows_of(streams_of(builder, {"a": 300, "b": 300}))
        return steps_of(loader_of(windows, 12, topology))

    alone = batches(0, 1, 4, 1)
    ranks = [batches(rank, 2, 1, 2) for rank in (0, 1)]
    assert [len(rank) for rank in ranks] == [24, 24]
    together = [
        [*ranks[0][2 * step], *ranks[1][2 * step], *ranks[0][2 * step + 1], *ranks[1][2 * step + 1]]
        for step in range(12)
    ]
    assert ids(together) == ids(alone)


# --- resuming -------------------------------------------------------------------------------------------------------


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("packing", ["best_fit", "none", "concat"])
@pytest.mark.parametrize("done", [0, 1, 4, 5, 13, 29])
def test_a_run_continues_with_the_same_rows_to_the_bit(
    done: int, packing: Any, builder: ExampleBuilder, read: Counter[str]
) -> None:
    def loader(topology: Topology | None = None) -> StreamLoader:
        streams = streams_of(builder, {"a": 100, "b": 70}, limits_of(packing), b=2.0)
        return loader_of(windows_of(streams, packing), 30, topology)

    whole, part = list(loader()), loader()
    for _ in islice(part, done):
        pass
    state = through_a_file(part.state_dict())
    again = loader()
    again.load_state_dict(state)
    assert state["rows"] == done * ROWS_PER_STEP
    rest = list(again)
    assert ids([rows for rows, _ in rest]) == ids([rows for rows, _ in whole[done:]])
    assert [each for _, each in rest] == [each for _, each in whole[done:]]
    split = loader(Topology(batch_size=2, accumulate=2))
    split.load_state_dict(state)
    halves = steps_of(split)
    joined = [[*first, *second] for first, second in zip(halves[::2], halves[1::2], strict=True)]
    assert ids(joined) == ids([rows for rows, _ in whole[done:]])


def test_a_step_under_way_is_taken_again_from_its_first_row(builder: ExampleBuilder, read: Counter[str]) -> None:
    topology = Topology(batch_size=1, accumulate=4)

    def loader() -> StreamLoader:
        return loader_of(windows_of(streams_of(builder, {"a": 100})), 10, topology)

    whole, part, again = steps_of(loader()), loader(), loader()
    for _ in islice(part, 22):
        pass
    again.load_state_dict(part.state_dict())
    assert ids(steps_of(again)) == ids(whole[20:])


def test_a_position_carries_no_more_than_a_steps_rows(builder: ExampleBuilder, read: Counter[str]) -> None:
    windows = windows_of(streams_of(builder, {"a": 3000}))
    carried = []
    for _ in range(20):
        windows.next_window()
        carried.append(len(windows.position()["carried"]["input_ids"]))
    assert max(carried) <= (ROWS_PER_STEP - 1) * LIMITS.max_length
    assert any(carried)


def test_other_records_at_the_position_are_refused(
    builder: ExampleBuilder, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = loader_of(windows_of(streams_of(builder, {"a": 300})), 30)
    for _ in islice(loader, 12):
        pass
    state = loader.state_dict()
    before = stream_source.read_records

    def changed(name: str, config: SourceConfig) -> Iterator[Record]:
        return (replace(record, fields={**record.fields, "output": "other"}) for record in before(name, config))

    monkeypatch.setattr(stream_source, "read_records", changed)
    again = loader_of(windows_of(streams_of(builder, {"a": 300})), 30)
    again.load_state_dict(state)
    with pytest.raises(UserError, match="--ckpt_path: the streamed sources no longer hold"):
        next(iter(again))


# --- the data module ------------------------------------------------------------------------------------------------


@pytest.fixture
def module(model_dir: Path, alpaca_file: Path) -> Callable[..., SFTDataModule]:
    def make(max_steps: int | None = 3, accumulate: int = 1, limit: float = 1.0, **changes: Any) -> SFTDataModule:
        options: dict[str, Any] = {
            "sources": {"toy": SourceConfig(path=str(alpaca_file), streaming=True)},
            "template": "alpaca",
            "max_length": 256,
            "tokenizer_name_or_path": str(model_dir),
        }
        data = SFTDataModule(DataSpec(**{**options, **changes}))
        if max_steps is not None:
            data.trainer = SimpleNamespace(
                max_steps=max_steps, max_epochs=-1, accumulate_grad_batches=accumulate, world_size=1, global_rank=0,
                limit_train_batches=limit,
            )  # fmt: skip
        return data

    return make


Make = Callable[..., SFTDataModule]


def test_a_streamed_run_is_one_epoch_of_max_steps(module: Make) -> None:
    data = module(max_steps=5, accumulate=2)
    data.setup("fit")
    loader = data.train_dataloader()
    assert data.num_optimizer_steps == 5
    assert len(loader) == len(list(loader)) == 10
    report = data.report.as_dict()["sources"]["train/toy"]
    assert report["streaming"]
    assert report["format"] == "alpaca"
    assert report["records"] >= 24
    json.dumps(report)


def test_nothing_is_read_but_the_first_record_before_training(module: Make, tmp_path: Path) -> None:
    data = module(store_dir=str(tmp_path / "stores"))
    data.setup("fit")
    assert data.report.sources["train/toy"].format == "alpaca"
    assert data.report.sources["train/toy"].records == 0
    assert not (tmp_path / "stores").exists()


def test_a_stream_without_max_steps_is_refused(module: Make) -> None:
    with pytest.raises(UserError, match=r"^trainer.max_steps: not set, but data.sources are streamed"):
        module(max_steps=-1).setup("fit")


def test_limit_train_batches_is_refused(module: Make) -> None:
    data = module(max_steps=4, limit=0.5)
    data.setup("fit")
    with pytest.raises(UserError, match=r"trainer.limit_train_batches: 0.5"):
        data.train_dataloader()


def test_all_training_sources_are_streamed_if_one_is(
    module: Make, alpaca_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(alpaca_file)
    data = module(sources={"a": SourceConfig(path=path, streaming=True), "b": SourceConfig(path=path)})
    with caplog.at_level(logging.INFO):
        data.setup("fit")
        data.setup("fit")
    assert caplog.text.count("b too, since all training sources are streamed if one is") == 1
    assert "weights are shares of tokens" in caplog.text
    assert all(report.streaming for report in data.report.sources.values())


def test_validation_sources_beside_a_stream_stay_stores(module: Make, alpaca_file: Path, tmp_path: Path) -> None:
    data = module(val_sources={"v": SourceConfig(path=str(alpaca_file))}, store_dir=str(tmp_path / "stores"))
    data.setup("fit")
    assert data.val_names == ["v"]
    assert data.report.sources["val/v"].examples == 24


def test_prepare_says_that_a_stream_is_not_stored(
    module: Make,
    tmp_path: Path,
    alpaca_file: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = module(
        max_steps=None, store_dir=str(tmp_path / "stores"), val_sources={"v": SourceConfig(path=str(alpaca_file))}
    )
    with caplog.at_level(logging.INFO):
        prepare(data)
    assert "toy streamed while training, nothing is stored" in caplog.text
    out = capsys.readouterr().out
    assert "val/v: " in out
    assert "train/toy: " not in out


def test_a_checkpoint_of_stored_data_is_refused(module: Make, alpaca_file: Path, tmp_path: Path) -> None:
    stored = module(sources={"toy": SourceConfig(path=str(alpaca_file))}, store_dir=str(tmp_path / "stores"))
    stored.setup("fit")
    data = module()
    data.setup("fit")
    with pytest.raises(UserError, match="different data settings"):
        data.load_state_dict(stored.state_dict())
    data.load_state_dict(module().state_dict())


def test_weights_and_ids_survive_the_way_through_a_window(builder: ExampleBuilder, read: Counter[str]) -> None:
    (stream,) = streams_of(builder, {"a": 30})
    window = windows_of([stream]).next_window()
    for index, (_, example) in zip(range(len(window.store)), stream.examples(), strict=False):
        kept = window.store.example(index, 0, int(window.store.lengths[index]))
        assert np.array_equal(kept.input_ids, example.input_ids)
        assert np.array_equal(kept.loss_weights, example.loss_weights)
