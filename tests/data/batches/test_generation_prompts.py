from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.batches.generation_prompts import PromptLoader, make_prompts, prompts_of
from sft_lightning.data.plan.split_examples import LengthLimits
from sft_lightning.data.plan.split_reader import SplitOptions, SplitReader
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.templates.binding import bind_template
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.errors import UserError
from sft_lightning.types import Record

SOURCE = SourceConfig(path="toy.json")
ALPACA: dict[str, Any] = {"instruction": "Who?", "output": "Me."}


@pytest.fixture
def builder(tokenizer: PreTrainedTokenizerFast) -> ExampleBuilder:
    return ExampleBuilder(tokenizer=tokenizer, template=bind_template("alpaca", tokenizer), loss_on="assistant")


def record(index: int, fields: dict[str, Any]) -> Record:
    return Record(fields=fields, source="toy", location=f"toy.json, record {index}")


def prompts(builder: ExampleBuilder, *rows: dict[str, Any]) -> list[dict[str, str]]:
    return list(make_prompts(builder, [record(index, row) for index, row in enumerate(rows)], SOURCE))


def test_a_prompt_ends_where_the_last_answer_begins_and_that_is_its_reference(builder: ExampleBuilder) -> None:
    [prompt] = prompts(builder, ALPACA)
    assert prompt["prompt"].endswith("### Instruction:\nWho?\n\n### Response:")
    assert (prompt["reference"], prompt["source"], prompt["location"]) == ("Me.", "toy", "toy.json, record 0")


def test_a_question_without_an_answer_has_no_reference(builder: ExampleBuilder) -> None:
    [prompt] = prompts(builder, {"instruction": "Who?"})
    assert prompt["prompt"].endswith("### Response:")
    assert "reference" not in prompt


def test_a_document_is_continued_from_its_first_80_characters_cut_between_words(builder: ExampleBuilder) -> None:
    [prompt] = prompts(builder, {"text": "word " * 100})
    assert prompt["prompt"] == "<s>" + ("word " * 16).rstrip()


def test_malformed_records_are_an_error_or_left_out(builder: ExampleBuilder) -> None:
    broken = {"instruction": "Who?", "output": 3}
    with pytest.raises(UserError, match="record 1"):
        prompts(builder, ALPACA, broken)
    assert len(prompts(replace(builder, malformed="drop"), ALPACA, broken)) == 1


def test_prompts_of_a_split_come_source_by_source_up_to_a_limit(
    builder: ExampleBuilder, write_json: Callable[[str, Any], Path], tmp_path: Path
) -> None:
    sources = {name: SourceConfig(path=str(write_json(f"{name}.json", [ALPACA] * 2))) for name in ("one", "two")}
    reader = SplitReader({"val": sources}, SplitOptions(), builder, LengthLimits(max_length=99), tmp_path / "stores")
    assert [prompt["source"] for prompt in prompts_of(reader, "val")] == ["one", "one", "two", "two"]
    assert [prompt["source"] for prompt in prompts_of(reader, "val", 3)] == ["one", "one", "two"]


def test_malformed_records_without_a_prompt_are_counted(
    builder: ExampleBuilder, write_json: Callable[[str, Any], Path], tmp_path: Path
) -> None:
    broken = {"instruction": "Who?", "output": 3}
    sources = {"one": SourceConfig(path=str(write_json("one.json", [broken, ALPACA, broken])))}
    drops = replace(builder, malformed="drop")
    reader = SplitReader({"val": sources}, SplitOptions(), drops, LengthLimits(max_length=99), tmp_path / "stores")
    said: list[str] = []
    assert len(prompts_of(reader, "val", log=said.append)) == 1
    [line] = said
    assert line.startswith("data.malformed: drop left 2 records without a prompt, the first at ")
    assert "one.json" in line


def test_ranks_take_batches_in_turn_and_have_as_many() -> None:
    every = [{"prompt": str(number)} for number in range(7)]
    loaders = [PromptLoader(every, 2, rank=rank, world_size=2) for rank in (0, 1)]
    taken = [[[prompt["prompt"] for prompt in batch] for batch in loader] for loader in loaders]
    assert taken == [[["0", "1"], ["4", "5"]], [["2", "3"], ["6"]]]
    assert [len(loader) for loader in loaders] == [2, 2]
    assert [loader.batch_lengths for loader in loaders] == [[2, 2], [2, 1]]


def test_batches_that_were_answered_before_come_empty() -> None:
    loader = PromptLoader([{"prompt": str(number)} for number in range(5)], 2)
    loader.num_answered = 2
    assert list(loader) == [[], [], [{"prompt": "4"}]]
