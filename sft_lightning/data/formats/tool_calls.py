"""Tool calls and available tools → OpenAI's shape, which chat templates read.

Arguments become objects: OpenAI's files hold them as a JSON string, which templates would quote a second time
(transformers' documentation, "Tool use": `arguments` is a dictionary, not a JSON string).
"""

from __future__ import annotations

import json
from typing import Any

from sft_lightning.data.formats.fields import malformed
from sft_lightning.errors import shortened
from sft_lightning.types import Record


def read_calls(record: Record, where: str, calls: Any) -> list[dict[str, Any]]:
    """Return calls as `{"type": "function", "function": {"name": …, "arguments": {…}}}`, with their `id` if any.

    Args:
        record: The record, for messages.
        where: The path of `calls` within the record.
        calls: A call, a list of calls, or JSON of either; a call is bare (`name`, `arguments`) or in OpenAI's shape.

    Raises:
        Malformed: If `calls` is none of these.
    """
    if isinstance(calls, str):
        calls = _parse(record, where, calls)
    if isinstance(calls, list):
        return [_call(record, f"{where}[{i}]", call) for i, call in enumerate(calls)]
    return [_call(record, where, calls)]


def read_tools(record: Record) -> list[dict[str, Any]]:
    """Return the record's `tools`, a list or JSON of one, in OpenAI's shape; a bare schema is wrapped as a function.

    Raises:
        Malformed: If `tools` is not a list of objects with a name.
    """
    tools = record.fields.get("tools")
    if tools is None or tools == "":
        return []
    if isinstance(tools, str):
        tools = _parse(record, "tools", tools)
    if not isinstance(tools, list):
        raise malformed(record, f"`tools` must be a list of function schemas (got {type(tools).__name__})")
    return [_schema(record, f"tools[{i}]", tool) for i, tool in enumerate(tools)]


def _call(record: Record, where: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
        raise malformed(record, f"{where} must be an object with `name` and `arguments` (got {shortened(repr(call))})")
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = _parse(record, f"{where}.arguments", arguments)
    if not isinstance(arguments, dict):
        raise malformed(record, f"{where}.arguments must be an object (got {shortened(repr(arguments))})")
    shape = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return shape if call.get("id") is None else {"id": call["id"], **shape}


def _schema(record: Record, where: str, tool: Any) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise malformed(record, f"{where} must be a function schema with a `name` (got {shortened(repr(tool))})")
    return tool if "function" in tool else {"type": "function", "function": tool}


def _parse(record: Record, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"{where} is not valid JSON ({error.msg} at character {error.pos}): {shortened(repr(text))}"
        raise malformed(record, problem) from error
