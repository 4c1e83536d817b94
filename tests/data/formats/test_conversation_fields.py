from __future__ import annotations

from typing import Any

import pytest

from sft_lightning.data.formats.fields import Malformed
from sft_lightning.data.formats.registry import to_messages
from sft_lightning.types import Message, Record


def record(**fields: Any) -> Record:
    return Record(fields, "s", "f.json, record 0")


def read(turns: list[Any], **fields: Any) -> list[Message]:
    return to_messages(record(messages=turns, **fields), "messages")


QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("name", "role"),
    [("User", "user"), ("HUMAN", "user"), ("Assistant", "assistant"), ("gpt", "assistant"), ("model", "assistant")],
)
def test_roles_have_many_names_in_upper_and_lower_case(name: str, role: str) -> None:
    other = ANSWER if role == "user" else QUESTION
    turns = [{"role": name, "content": "x"}, other] if role == "user" else [other, {"role": name, "content": "x"}]
    assert role in [message.role for message in read(turns) if message.content == "x"]


def test_a_developer_message_is_a_system_message() -> None:
    assert read([{"role": "developer", "content": "S"}, QUESTION, ANSWER])[0] == Message("system", "S")


@pytest.mark.parametrize("name", ["messages", "sharegpt"])
@pytest.mark.parametrize("list_key", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value"), ("from", "content")])
def test_messages_are_read_under_all_the_usual_keys(name: str, list_key: str, keys: tuple[str, str]) -> None:
    role, content = keys
    turns = [{role: "user", content: "q"}, {role: "assistant", content: "a"}]
    assert to_messages(record(**{list_key: turns}), name) == [Message("user", "q"), Message("assistant", "a")]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]
    assert read([{"role": "user", "content": parts}, ANSWER])[0].content == "one two"


def test_a_part_that_is_not_text_is_refused_as_multimodal() -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(Malformed, match=r"messages\[0\].content\[1\] is of type 'image_url'.*only text is supported"):
        read([{"role": "user", "content": parts}, ANSWER])


def test_tool_calls_need_no_content_and_keep_the_keys_that_templates_read() -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    turns = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "hm", "name": None},
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add", "tool_calls": None},
        ANSWER,
    ]
    found = read(turns)
    parsed = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    assert found[1] == Message("assistant", "", extras={"reasoning_content": "hm", "tool_calls": parsed})
    assert found[2] == Message("tool", "2", extras={"tool_call_id": "c1", "name": "add"})


def test_openais_older_function_call_is_a_tool_call() -> None:
    call = {"name": "add", "arguments": "{}"}
    found = read(
        [QUESTION, {"role": "assistant", "content": None, "function_call": call}, {"role": "function", "content": "2"}]
    )
    assert found[1].extras["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    assert found[2].role == "tool"


def test_sharegpt_calls_and_observations_become_tool_calls_and_tool_messages() -> None:
    schema = {"name": "add", "description": "adds", "parameters": {}}
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "a", "weight": 0.5},
    ]
    found = to_messages(record(conversations=turns, system="S", tools=[schema]), "sharegpt")
    assert found == [
        Message("system", "S", tools=[{"type": "function", "function": schema}]),
        Message("user", "q"),
        Message(
            "assistant",
            "",
            extras={"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]},
        ),
        Message("tool", "2"),
        Message("assistant", "a", weight=0.5),
    ]


@pytest.mark.parametrize("system", ["S", ""])
def test_a_records_system_text_comes_first_even_if_empty(system: str) -> None:
    assert read([QUESTION, ANSWER], system=system)[0] == Message("system", system)


def test_a_system_text_that_is_there_twice_is_used_once() -> None:
    assert [message.role for message in read([{"role": "system", "content": "S"}, QUESTION, ANSWER], system="S")] == [
        "system", "user", "assistant",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("turns", "fields", "said", "reason"),
    [
        ([{"role": "system", "content": "T"}, QUESTION, ANSWER], {"system": "S"}, "two different", "misplaced_system"),
        ([QUESTION, ANSWER], {"system": 1}, "`system` must be a string (got int)", "broken_record"),
        ([{"content": "q"}, ANSWER], {}, "messages[0] has no `role` (or `from`)", "broken_record"),
        ([{"role": "asistant", "content": "q"}], {}, "Did you mean 'assistant'?", "unknown_role"),
        ([{"role": 1, "content": "q"}], {}, "messages[0].role: 1 is unknown", "unknown_role"),
        ([{"from": "human"}], {}, "`messages[0].value` is missing", "broken_record"),
        ([{"role": "user", "content": None}], {}, "`messages[0].content` must be a string", "broken_record"),
        ([{"role": "user", "content": ["q"]}], {}, "messages[0].content[0] is of type 'str'", "broken_record"),
        ([QUESTION, {**ANSWER, "name": 1}], {}, "`messages[1].name` must be a string (got int)", "broken_record"),
        ([{"from": "function_call", "value": "add"}], {}, "messages[0].value is not valid JSON", "broken_record"),
    ],
)
def test_a_broken_message_is_refused_with_its_path(
    turns: list[Any], fields: dict[str, Any], said: str, reason: str
) -> None:
    with pytest.raises(Malformed) as error:
        read(turns, **fields)
    assert said in str(error.value)
    assert "f.json, record 0" in str(error.value)
    assert error.value.reason == reason
