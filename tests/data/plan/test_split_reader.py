from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.plan.split_examples import LengthLimits
from sft_lightning.data.plan.split_reader import Split, SplitOptions, SplitReader
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.templates.binding import bind_template
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.errors import UserError

Read = Callable[..., SplitReader]


@pytest.fixture
def read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Read:
    """A reader of two training sources of 10 records and a validation source of 10, of numbered questions."""
    own = copy.deepcopy(tokenizer)
    builder = ExampleBuilder(tokenizer=own, template=bind_template("alpaca", own), loss_on="assistant")

    def make(
        *,
        num_records: int = 10,
        sft_only: tuple[str, ...] = (),
        limits: dict[str, Any] | None = None,
        other: dict[Split, Any] | None = None,
        **options: Any,
    ) -> SplitReader:
        def source(name: str) -> SourceConfig:
            rows = [{"instruction": f"{name} {i}", "output": f"{i}"} for i in range(num_records)]
            (tmp_path / f"{name}.json").write_text(json.dumps(rows))
            return SourceConfig(path=str(tmp_path / f"{name}.json"), sft_only=name in sft_only)

        held_out: dict[Split, Any] = {"val": {}} if options.get("val_fraction") else {"val": {"held": source("held")}}
        return SplitReader(
            {"train": {"one": source("one"), "two": source("two")}, **held_out, **(other or {})},
            SplitOptions(**options),
            builder,
            LengthLimits(**{"max_length": 200, **(limits or {})}),
            tmp_path / "stores",
        )

    return make


def numbers(reader: SplitReader, split: Split, name: str) -> list[int]:
    """The records of a split, checked against its examples."""
    found = [int(record.fields["output"]) for record in reader.records(split, name)]
    [part] = [part for part in reader.examples(split) if part.name == name]
    assert part.store.records[part.indices].tolist() == found
    assert part.report.records == len(found)
    return found


def members(reader: SplitReader, split: Split) -> list[int]:
    [name] = reader.sources(split)
    return [int(record.location.rpartition(" ")[2]) for record in reader.records(split, name)]


def test_by_default_every_split_has_all_records_of_its_sources(read: Read) -> None:
    reader = read()
    assert [part.name for part in reader.examples("train")] == ["one", "two"]
    assert numbers(reader, "train", "two") == numbers(reader, "val", "held") == list(range(10))
    assert reader.sources("test") == {}
    with pytest.raises(UserError, match=r"data\.test_sources: no source given"):
        reader.examples("test")


def test_a_fraction_of_each_source_is_held_out_disjoint_complete_and_in_file_order(read: Read) -> None:
    reader, again = read(val_fraction=0.2), read(val_fraction=0.2)
    for name in ("one", "two"):
        train, held_out = numbers(reader, "train", name), numbers(reader, "val", name)
        assert len(held_out) == 2
        assert sorted(train + held_out) == list(range(10))
        assert train == sorted(train)
        assert held_out == numbers(again, "val", name)
    assert numbers(reader, "val", "one") != numbers(read(val_fraction=0.2, seed=5), "val", "one")


def test_each_source_has_its_own_draw_of_held_out_records(read: Read) -> None:
    reader = read(val_fraction=0.3, num_records=40)
    assert numbers(reader, "val", "one") != numbers(reader, "val", "two")


def test_the_stages_of_a_split_are_disjoint_and_complete(read: Read) -> None:
    parts = [numbers(read(data_split="2,4,4", data_split_part=part), "train", "one") for part in range(3)]
    assert [len(part) for part in parts] == [2, 4, 4]
    assert sorted(number for part in parts for number in part) == list(range(10))


def test_the_first_stage_has_exactly_the_records_of_deepspeed_chat(read: Read) -> None:
    reader = read(data_split="2,4,4", compat="deepspeed_chat", seed=1234)
    assert numbers(reader, "train", "one") == [2, 7]


def test_a_data_set_with_one_split_is_divided_as_by_deepspeed_chat(tmp_path: Path, read: Read) -> None:
    rows = [{"INSTRUCTION": f"{i}", "RESPONSE": f"{i}"} for i in range(30)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    train, val = (
        {"kol": SourceConfig(path=str(tmp_path / "train.json"), format="deepspeed_chat/Zhihu-KOL")} for _ in range(2)
    )
    reader = read(other={"train": train, "val": val}, data_split="2,8", compat="deepspeed_chat", seed=7)
    order = np.random.RandomState(7).permutation(30)
    nine, one = order[:27], order[27:]
    assert members(reader, "train") == sorted(nine[np.random.RandomState(7).permutation(27)[:5]].tolist())
    assert members(reader, "val") == sorted(one[np.random.RandomState(7).permutation(3)[:1]].tolist())


@pytest.mark.parametrize("compat", [None, "deepspeed_chat"])
def test_a_source_that_is_sft_only_is_used_in_full(compat: Any, read: Read) -> None:
    reader = read(data_split="2,4,4", compat=compat, sft_only=("two",))
    assert len(numbers(reader, "train", "one")) == 2
    assert numbers(reader, "train", "two") == list(range(10))


def test_validation_sources_are_divided_into_stages_only_as_by_deepspeed_chat(read: Read) -> None:
    assert numbers(read(data_split="2,4,4"), "val", "held") == list(range(10))
    reader = read(data_split="2,4,4", compat="deepspeed_chat", seed=1234)
    assert numbers(reader, "val", "held") == [2, 7]
    exempt = read(data_split="2,4,4", compat="deepspeed_chat", sft_only=("held",))
    assert numbers(exempt, "val", "held") == list(range(10))


@pytest.mark.parametrize("split", ["test", "predict"])
def test_sources_to_test_and_predict_on_are_never_divided(split: Split, read: Read, write_json: Any) -> None:
    path = write_json("asked.json", [{"instruction": f"{i}", "output": f"{i}"} for i in range(10)])
    asked = {split: {"asked": SourceConfig(path=str(path))}}
    for options in ({"data_split": "2,4,4", "compat": "deepspeed_chat"}, {"val_fraction": 0.5}):
        reader = read(other=asked, **options)
        assert [int(record.fields["output"]) for record in reader.records(split, "asked")] == list(range(10))


def test_records_held_out_of_a_stage_belong_to_it_and_are_not_trained_on(read: Read) -> None:
    options = {"data_split": "1,1", "data_split_part": 1, "seed": 3}
    stage = numbers(read(**options, num_records=20), "train", "one")
    reader = read(**options, num_records=20, val_fraction=0.3)
    train, held_out = numbers(reader, "train", "one"), numbers(reader, "val", "one")
    assert (len(train), len(held_out)) == (7, 3)
    assert sorted(train + held_out) == stage


def test_records_are_held_out_of_all_records_of_an_sft_only_source(read: Read) -> None:
    reader = read(data_split="1,1", val_fraction=0.2, sft_only=("two",))
    assert (len(numbers(reader, "train", "two")), len(numbers(reader, "val", "two"))) == (8, 2)
    assert (len(numbers(reader, "train", "one")), len(numbers(reader, "val", "one"))) == (4, 1)


def test_dividing_records_differently_tokenizes_nothing_again(read: Read) -> None:
    assert read().prepare("train", "one").built
    for options in ({"val_fraction": 0.2}, {"data_split": "2,4,4", "data_split_part": 1}, {"seed": 7}):
        assert not read(**options).prepare("train", "one").built
    reader = read(limits={"max_length": 60, "overlong": "drop", "min_length": 3, "cuts_examples": True})
    assert not reader.prepare("train", "one").built
    assert reader.prepare("train", "one", rebuild=True).built


def test_a_stage_without_records_is_refused(read: Read) -> None:
    with pytest.raises(UserError, match=r"data\.data_split: '9,1' gives stage 1 no record of 3"):
        read(num_records=3, data_split="9,1", data_split_part=1).examples("train")


def test_an_overlong_example_is_named_by_file_and_line(read: Read, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}/one\.json, record \d: \d+ tokens, but data\.max_length is 20"):
        read(limits={"max_length": 20}).examples("train")


def test_a_source_that_has_no_example_left_is_named(read: Read) -> None:
    reader = read(limits={"max_length": 20, "overlong": "drop"})
    assert [part.report.examples for part in reader.examples("train")] == [0, 0]
    assert [part.report.examples for part in reader.examples("val")] == [0]
    with pytest.raises(UserError, match=r"data\.sources: no example is left to train on; dropped: \{'one': "):
        reader.check_left("train")
    with pytest.raises(UserError, match=r"no example of the val source 'held' is left; dropped: \{'overlong': 10\}"):
        reader.check_left("val")


def test_records_can_be_limited(read: Read) -> None:
    reader = read(data_split="1,1")
    assert len(list(reader.records("train", "one", limit=2))) == 2
    assert list(reader.records("train", "one", limit=2)) == list(reader.records("train", "one"))[:2]


def test_a_copy_of_a_file_names_its_own_records(read: Read, tmp_path: Path, write_json: Any) -> None:
    # Two files of the same bytes share a token store, but not their places.
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": ""}]
    paths = {name: write_json(f"{name}.json", rows) for name in ("first", "copy")}
    reader = read(other={"test": {name: SourceConfig(path=str(path)) for name, path in paths.items()}})
    reports = {part.name: part.report for part in reader.examples("test")}
    assert {name: report.dropped_at for name, report in reports.items()} == {
        name: {"no_answer": [f"{path}, record 1"]} for name, path in paths.items()
    }


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5])
def test_a_fraction_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=r"data\.val_fraction: must be in \[0, 1\)"):
        SplitOptions(val_fraction=fraction)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"data_split": "a"}, "data.data_split: 'a'"),
        ({"data_split": "1,1", "data_split_part": 2}, "data.data_split_part: must be"),
        ({"data_split_part": 1}, "data.data_split_part: 1"),
    ],
)
def test_an_impossible_division_is_refused_before_anything_is_tokenized(options: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        SplitOptions(**options)
