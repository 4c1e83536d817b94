from __future__ import annotations

from typing import Any

import pytest

from sft_lightning.data.formats import find_format, to_messages
from sft_lightning.errors import UserError
from sft_lightning.types import Message, Record


def record(**fields: Any) -> Record:
    return Record(fields, "s", "f.json, record 0")


def test_alpaca_keeps_the_input_as_context() -> None:
    assert to_messages(record(instruction="Add", input="1, 2", output="3"), "alpaca") == [
        Message("user", "Add", context="1, 2"),
        Message("assistant", "3"),
    ]


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None}])
def test_alpaca_without_input_has_no_context(empty: dict[str, Any]) -> None:
    assert to_messages(record(instruction="Hi", output="Ho", **empty), "alpaca")[0].context is None


def test_alpaca_takes_a_system_text_and_a_history() -> None:
    found = to_messages(record(system="S", history=[["q", "a"]], instruction="Hi", output="Ho"), "alpaca")
    assert [(m.role, m.content) for m in found] == [
        ("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "Hi"), ("assistant", "Ho"),
    ]  # fmt: skip


def test_messages_keep_train_and_weight() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False, "weight": 2}]
    assert to_messages(record(messages=turns), "messages")[1] == Message("assistant", "a", train=False, weight=2.0)


def test_a_null_weight_is_no_weight() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": None, "weight": None}]
    assert to_messages(record(messages=turns), "messages")[1] == Message("assistant", "a")


def test_sharegpt_maps_roles_and_leaves_out_a_leading_answer() -> None:
    turns = [{"from": "gpt", "value": "?"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert to_messages(record(conversations=turns), "sharegpt") == [Message("user", "q"), Message("assistant", "a")]


def test_prompt_and_completion_stand_as_they_are_with_the_completion_supervised() -> None:
    assert to_messages(record(prompt="2+2=", completion="4"), "prompt_completion") == [
        Message("text", "2+2=", train=False),
        Message("text", "4", train=True),
    ]


def test_segments_say_themselves_what_is_supervised() -> None:
    pieces = [{"text": "Q ", "train": False}, {"text": "A", "train": True, "weight": 0.5}]
    assert to_messages(record(segments=pieces), "segments") == [
        Message("text", "Q ", train=False),
        Message("text", "A", train=True, weight=0.5),
    ]


def test_firefly_pairs_become_turns() -> None:
    pairs = [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": "b"}]
    found = to_messages(record(conversation=pairs, system="S", source="lima"), "firefly")
    assert [(m.role, m.content) for m in found] == [
        ("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"),
    ]  # fmt: skip


def test_text_is_one_document() -> None:
    assert to_messages(record(text="once"), "text") == [Message("text", "once")]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": []}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"instruction": ""}, "alpaca"),
        ({"text": ""}, "text"),
        ({"conversation": []}, "firefly"),
        ({"segments": []}, "segments"),
        ({"prompt": "", "completion": ""}, "prompt_completion"),
    ],
)
def test_the_format_is_found_from_the_keys(fields: dict[str, Any], expected: str) -> None:
    assert find_format(None, record(**fields)) == expected


def test_an_unknown_format_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'alpaca'"):
        find_format("alpacca", record())


def test_a_record_whose_format_cannot_be_told_shows_its_keys() -> None:
    with pytest.raises(UserError, match=r"keys \['question'\]"):
        find_format(None, record(question="?"))


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("fields", "name", "said"),
    [
        ({"instruction": "Hi"}, "alpaca", "`output` is missing"),
        ({"instruction": "Hi", "output": None}, "alpaca", "`output` must be a string, not NoneType"),
        ({"instruction": "Hi", "output": "x", "input": 3}, "alpaca", "`input` must be a string"),
        ({"instruction": "Hi", "output": "x", "history": [["q"]]}, "alpaca", "`history` must be"),
        ({"messages": "x"}, "messages", "must be a list of turns, not str"),
        ({"message": []}, "messages", "the record's keys are: message"),
        ({"messages": ["x"]}, "messages", "messages[0] must be an object"),
        (turns("user", "robot"), "messages", "messages[1].role: 'robot' is unknown"),
        (turns("user", "user", "assistant"), "messages", "turns 0 and 1 are both the user's"),
        (turns("assistant", "user"), "messages", "turn 0 is an answer without a question"),
        (turns("user", "system", "assistant"), "messages", "turn 1 is a system turn"),
        (turns("user"), "messages", "no assistant turn"),
        ({"messages": [{"role": "user", "content": "x", "train": 1}]}, "messages", "train must be true or false"),
        ({"messages": [{"role": "user", "content": "x", "weight": -1}]}, "messages", "weight must be a number"),
        ({"messages": [{"role": "user", "content": "x", "weight": float("nan")}]}, "messages", "weight must be"),
        ({"conversation": [{"human": "q"}]}, "firefly", "`conversation[0].assistant` is missing"),
        ({"conversation": "q"}, "firefly", "`conversation` must be a list"),
        ({"prompt": "q"}, "prompt_completion", "`completion` is missing"),
        ({"segments": [{"text": 1}]}, "segments", "`segments[0].text` must be a string"),
        ({"messages": [{"role": "user"}]}, "messages", "`messages[0].content` is missing"),
    ],
)
def test_a_wrong_record_is_refused_with_its_place(fields: dict[str, Any], name: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        to_messages(record(**fields), name)
    assert "f.json, record 0" in str(error.value)
    assert said in str(error.value)
