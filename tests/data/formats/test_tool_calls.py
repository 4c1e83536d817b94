from __future__ import annotations

from typing import Any

import pytest

from sft_lightning.data.formats.fields import Malformed
from sft_lightning.data.formats.tool_calls import read_calls, read_tools
from sft_lightning.types import Record

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def record(**fields: Any) -> Record:
    return Record(fields, "s", "f.json, record 0")


@pytest.mark.parametrize(
    "calls",
    [
        {"name": "add", "arguments": {"a": 1}},
        '{"name": "add", "arguments": {"a": 1}}',
        '[{"name": "add", "arguments": {"a": 1}}]',
        [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        [{"id": None, "function": {"name": "add", "arguments": {"a": 1}}}],
    ],
)
def test_all_ways_to_write_calls_give_one_shape(calls: Any) -> None:
    assert read_calls(record(), "messages[1].tool_calls", calls) == [CALL]


def test_a_call_keeps_its_id() -> None:
    assert read_calls(record(), "here", [{"id": "c1", **CALL}]) == [{"id": "c1", **CALL}]


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ("add(1)", "here is not valid JSON"),
        ([{"name": "add"}], "here[0] must be an object with `name` and `arguments`"),
        ([{"name": "add", "arguments": "a=1"}], "here[0].arguments is not valid JSON"),
        ([{"name": "add", "arguments": [1]}], "here[0].arguments must be an object"),
        (["add"], "here[0] must be an object"),
    ],
)
def test_a_broken_call_is_refused_with_its_path(calls: Any, said: str) -> None:
    with pytest.raises(Malformed) as error:
        read_calls(record(), "here", calls)
    assert f"f.json, record 0: {said}" in str(error.value)
    assert error.value.reason == "broken_record"


SCHEMA = {"name": "add", "description": "adds", "parameters": {}}


@pytest.mark.parametrize(
    "tools",
    [
        [SCHEMA],
        '[{"name": "add", "description": "adds", "parameters": {}}]',
        [{"type": "function", "function": SCHEMA}],
    ],
)
def test_tools_are_wrapped_as_functions(tools: Any) -> None:
    assert read_tools(record(tools=tools)) == [{"type": "function", "function": SCHEMA}]


@pytest.mark.parametrize("none", [{}, {"tools": None}, {"tools": ""}, {"tools": "[]"}, {"tools": []}])
def test_a_missing_null_or_empty_list_of_tools_is_no_tools(none: dict[str, Any]) -> None:
    assert read_tools(record(**none)) == []


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("add", "tools is not valid JSON"),
        ({"name": "add"}, "`tools` must be a list of function schemas (got dict)"),
        ([{"description": "adds"}], "tools[0] must be a function schema with a `name`"),
        (["add"], "tools[0] must be a function schema"),
    ],
)
def test_broken_tools_are_refused_with_their_path(tools: Any, said: str) -> None:
    with pytest.raises(Malformed) as error:
        read_tools(record(tools=tools))
    assert said in str(error.value)
