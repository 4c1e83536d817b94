"""A record's conversation → messages, under any of the usual keys.

A message has a `role` (or `from`) and a `content` (or `value`), and may have `train` and `weight`. Files mix the keys
(`from` with `content`), so every format accepts both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sft_lightning.data.formats.fields import Malformed, actual_value, malformed, read_text, read_train, read_weight
from sft_lightning.data.formats.tool_calls import read_calls, read_tools
from sft_lightning.errors import one_of
from sft_lightning.types import Message, Record, Role

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
"""Our role for each name of a role in files, in lower case; the content of a `function_call` message is the call."""

_EXTRAS = ("tool_call_id", "name", "reasoning_content")


def read_conversation(record: Record, keys: Sequence[str]) -> list[Message]:
    """Return the messages under the first of `keys` that the record has, with the record's `system` and `tools`.

    A `system` of `""` is a system message without text; with null there is none, and the template decides.

    Args:
        record: The record.
        keys: Keys that may hold the messages.

    Raises:
        Malformed: If the messages do not fit the format.
    """
    key = next((key for key in keys if record.fields.get(key) is not None), keys[0])
    messages = read_messages(record, key, record.fields.get(key))
    system = record.fields.get("system")
    if system is not None:
        messages = with_system(record, messages, read_text(record, record.fields, "system"))
    return with_tools(messages, read_tools(record))


def read_messages(record: Record, where: str, stored: Any) -> list[Message]:
    """Return a list of messages as stored as `Message`s.

    Args:
        record: The record, for messages.
        where: The path of the list within the record.
        stored: The list.

    Raises:
        Malformed: If it is not a list, or a message does not fit the format.
    """
    if not isinstance(stored, list) or not stored:
        raise malformed(record, f"`{where}` must be a list of messages{actual_value(record.fields, where)}")
    return [read_message(record, f"{where}[{i}]", message) for i, message in enumerate(stored)]


def read_message(record: Record, where: str, stored: Any) -> Message:
    """Return a message as stored as a `Message`.

    Args:
        record: The record, for messages.
        where: The path of the message within the record: `messages[3]`.
        stored: The message.

    Raises:
        Malformed: If the role is unknown, or the content is not text.
    """
    if not isinstance(stored, dict):
        raise malformed(record, f"{where} must be an object with `role` and `content` (got {type(stored).__name__})")
    role_key = "role" if stored.get("role") is not None else "from"
    name, role = _role(record, where, stored, role_key)
    content_key = next((key for key in ("content", "value") if stored.get(key) is not None), None)
    if content_key is None:
        content_key = "value" if role_key == "from" and "content" not in stored else "content"
    extras = _extras(record, where, stored)
    if name == "function_call":
        content = ""
        extras["tool_calls"] = read_calls(record, f"{where}.{content_key}", stored.get(content_key))
    else:
        content = _content(record, where, stored, content_key, may_miss="tool_calls" in extras)
    train, weight = read_train(record, stored, where), read_weight(record, stored, where)
    return Message(role, content, train=train, weight=weight, extras=extras)


def read_instruction(record: Record) -> list[Message]:
    """Return the question of an Alpaca record: `instruction`, optional `input`, `system`, and `history` of pairs.

    Dolly's `context` is read where there is no `input`. Empty strings count as missing, because tables cannot leave out
    a column.

    Raises:
        Malformed: If a value does not fit its key.
    """
    fields = record.fields
    messages = [Message("system", read_text(record, fields, "system"))] if fields.get("system") else []
    history = fields.get("history") or []
    pairs = history if isinstance(history, list) else [history]
    for pair in pairs:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise malformed(record, "`history` must be a list of [question, answer] pairs of strings")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    key = "context" if "context" in fields and "input" not in fields else "input"
    context = read_text(record, fields, key) if fields.get(key) is not None else None
    return [*messages, Message("user", read_text(record, fields, "instruction"), context=context or None)]


def with_system(record: Record, messages: list[Message], system: str) -> list[Message]:
    """Return the messages with the record's own system text in front.

    Args:
        record: The record, for messages.
        messages: Its messages.
        system: Its system text.

    Raises:
        Malformed: If the messages begin with another system text.
    """
    if messages[0].role != "system":
        return [Message("system", system), *messages]
    if messages[0].content == system:
        return messages
    raise malformed(
        record, "the record's `system` and its first message are two different system texts", "misplaced_system"
    )


def with_tools(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """Return the messages with the available tools in the first one.

    Args:
        messages: The conversation.
        tools: The tools that it offers, as JSON schemas.
    """
    return [replace(messages[0], tools=tools), *messages[1:]] if tools else messages


def _role(record: Record, where: str, stored: Mapping[str, Any], key: str) -> tuple[str, Role]:
    name = stored.get(key)
    if name is None:
        raise malformed(record, f"{where} has no `role` (or `from`); its keys are: {', '.join(sorted(stored))}")
    known = ROLES.get(name.lower()) if isinstance(name, str) else None
    if known is None:
        unknown = one_of(f"{where}.{key}", name, ROLES)
        raise malformed(record, str(unknown), "unknown_role")
    return name.lower(), known


def _extras(record: Record, where: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    present = [key for key in _EXTRAS if stored.get(key) is not None]
    extras: dict[str, Any] = {key: read_text(record, stored, key, where) for key in present}
    calls = stored.get("tool_calls") or stored.get("function_call")  # the latter is OpenAI's older key
    if calls:
        extras["tool_calls"] = read_calls(record, f"{where}.tool_calls", calls)
    return extras


def _content(record: Record, where: str, stored: Mapping[str, Any], key: str, *, may_miss: bool) -> str:
    value = stored.get(key)
    if isinstance(value, str):
        return value
    if value is None and may_miss:
        return ""
    if isinstance(value, list):
        return "".join(_part(record, f"{where}.{key}[{i}]", part) for i, part in enumerate(value))
    return read_text(record, stored, key, where)


def _part(record: Record, where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise Malformed(
            f"{record.location}: {where} is of type {kind!r}, but only text is supported (no multimodal data); remove "
            "the part or set data.malformed: drop"
        )
    return read_text(record, part, "text", where)
