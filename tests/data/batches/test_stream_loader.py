from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from sft_lightning.data.batches import stream_source
from sft_lightning.data.batches.stream_loader import StreamLoader
from sft_lightning.data.batches.stream_source import RECORDS_AT_ONCE
from sft_lightning.data.plan.epoch_plan import Topology
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.errors import UserError
from sft_lightning.types import Record, TokenizedExample

Row = list[TokenizedExample]


def test_the_rows_of_all_ranks_together_are_the_step(streaming: Any, read: Counter[str]) -> None:
    def batches(rank: int, world_size: int, batch_size: int, accumulate: int) -> list[list[Row]]:
        topology = Topology(batch_size=batch_size, accumulate=accumulate, world_size=world_size, rank=rank)
        windows = streaming.windows(streaming.streams({"a": 300, "b": 300}))
        return streaming.steps(streaming.loader(windows, 12, topology))

    alone = batches(0, 1, 4, 1)
    ranks = [batches(rank, 2, 1, 2) for rank in (0, 1)]
    assert [len(rank) for rank in ranks] == [24, 24]
    together = [
        [*ranks[0][2 * step], *ranks[1][2 * step], *ranks[0][2 * step + 1], *ranks[1][2 * step + 1]]
        for step in range(12)
    ]
    assert streaming.ids(together) == streaming.ids(alone)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("packing", ["best_fit", "none", "concat"])
@pytest.mark.parametrize("done", [5, *(pytest.param(done, marks=pytest.mark.slow) for done in (0, 1, 4, 13, 29))])
def test_a_run_continues_with_the_same_rows_to_the_bit(
    done: int, packing: Any, streaming: Any, read: Counter[str]
) -> None:
    def loader(topology: Topology | None = None) -> StreamLoader:
        streams = streaming.streams({"a": 100, "b": 70}, streaming.limits_of(packing), b=2.0)
        return streaming.loader(streaming.windows(streams, packing), 30, topology)

    whole, part = list(loader()), loader()
    for _ in islice(part, done):
        pass
    state = through_a_file(part.state_dict())
    again = loader()
    again.load_state_dict(state)
    assert state["rows"] == done * streaming.rows_per_step
    rest = list(again)
    assert streaming.ids([rows for rows, _ in rest]) == streaming.ids([rows for rows, _ in whole[done:]])
    assert [each for _, each in rest] == [each for _, each in whole[done:]]
    split = loader(Topology(batch_size=2, accumulate=2))
    split.load_state_dict(state)
    halves = streaming.steps(split)
    joined = [[*first, *second] for first, second in zip(halves[::2], halves[1::2], strict=True)]
    assert streaming.ids(joined) == streaming.ids([rows for rows, _ in whole[done:]])


def test_an_incomplete_step_is_taken_again_from_its_first_row(streaming: Any, read: Counter[str]) -> None:
    topology = Topology(batch_size=1, accumulate=4)

    def loader() -> StreamLoader:
        return streaming.loader(streaming.windows(streaming.streams({"a": 100})), 10, topology)

    whole, part, again = streaming.steps(loader()), loader(), loader()
    for _ in islice(part, 22):
        pass
    again.load_state_dict(part.state_dict())
    assert streaming.ids(streaming.steps(again)) == streaming.ids(whole[20:])


def test_a_position_carries_fewer_tokens_than_a_step_has(streaming: Any, read: Counter[str]) -> None:
    windows = streaming.windows(streaming.streams({"a": 3000}))
    carried = []
    for _ in range(20):
        windows.next_window()
        carried.append(len(windows.position()["carried"]["input_ids"]))
    assert max(carried) <= (streaming.rows_per_step - 1) * streaming.limits.max_length
    assert any(carried)


def test_a_run_with_other_records_at_the_position_is_refused(
    streaming: Any, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = streaming.loader(streaming.windows(streaming.streams({"a": 300})), 30)
    for _ in islice(loader, 12):
        pass
    state = loader.state_dict()
    before = stream_source.read_records

    def changed(name: str, config: SourceConfig) -> Iterator[Record]:
        return (replace(record, fields={**record.fields, "output": "other"}) for record in before(name, config))

    monkeypatch.setattr(stream_source, "read_records", changed)
    again = streaming.loader(streaming.windows(streaming.streams({"a": 300})), 30)
    again.load_state_dict(state)
    with pytest.raises(UserError, match="--ckpt_path: the streamed sources no longer hold"):
        next(iter(again))


def test_reading_ahead_is_bounded_by_two_windows(streaming: Any, read: Counter[str]) -> None:
    loader = streaming.loader(streaming.windows(streaming.streams({"a": 100_000}), "none"), 500)
    trained = 0
    for rows, _ in islice(loader, 300):
        trained += len(rows)
        # This window, the next, the records tokenized together, and the record whose format was found.
        assert read["a"] <= trained + 2 * streaming.rows_per_window + RECORDS_AT_ONCE + 1
    assert trained == 300 * streaming.rows_per_step


def test_no_window_is_made_after_the_last_step(streaming: Any, read: Counter[str]) -> None:
    windows = streaming.windows(streaming.streams({"a": 100_000}))
    loader = streaming.loader(windows, 2)
    assert len(list(loader)) == 2
    assert windows.position()["window"] == 1


def test_the_rows_of_the_step_that_comes_next_are_known_before_they_are_taken(
    streaming: Any, read: Counter[str]
) -> None:
    loader = streaming.loader(streaming.windows(streaming.streams({"a": 300, "b": 300})), 12)
    assert loader.documents_of_step(0) is None  # nothing was taken yet
    taken, expected = [], []
    for step, (rows, _) in enumerate(loader):
        taken.append(rows)
        coming = loader.documents_of_step(step + 1) or []
        expected.append([[document.tokens for document in row] for row in coming])
    assert len(taken) == 12
    assert streaming.ids(expected[:-1]) == streaming.ids(taken[1:])
