"""A record's turns → messages, whichever of the usual keys they stand under.

A turn has a `role` (or `from`) and a `content` (or `value`), and may have `train` and `weight`. Files mix the keys
(`from` with `content`), so no format insists on its own pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sft_lightning.data.formats.fields import Malformed, found, malformed, read_text, read_train, read_weight
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
"""What files call the roles, in lower case; `function_call` is an assistant turn whose content is the call."""

_EXTRAS = ("tool_call_id", "name", "reasoning_content")


def read_conversation(record: Record, keys: Sequence[str]) -> list[Message]:
    """Return the turns under the first of `keys` that the record has, with the record's own `system` and `tools`.

    A `system` of `""` is a system message without text; null is none, which leaves it to the template.

    Raises:
        Malformed: If the turns are not what their keys say.
    """
    key = next((key for key in keys if record.fields.get(key) is not None), keys[0])
    turns = read_turns(record, key, record.fields.get(key))
    system = record.fields.get("system")
    if system is not None:
        turns = with_system(record, turns, read_text(record, record.fields, "system"))
    return with_tools(turns, read_tools(record))


def read_turns(record: Record, where: str, turns: Any) -> list[Message]:
    """Return a list of turns as messages.

    Raises:
        Malformed: If it is not a list, or a turn is not what its keys say.
    """
    if not isinstance(turns, list) or not turns:
        raise malformed(record, f"`{where}` must be a list of turns{found(record.fields, where)}")
    return [read_turn(record, f"{where}[{i}]", turn) for i, turn in enumerate(turns)]


def read_turn(record: Record, where: str, turn: Any) -> Message:
    """Return one turn as a message.

    Raises:
        Malformed: If the role is unknown, or the content is no text.
    """
    if not isinstance(turn, dict):
        raise malformed(record, f"{where} must be an object with `role` and `content`, not {type(turn).__name__}")
    role_key = "role" if turn.get("role") is not None else "from"
    name, role = _role(record, where, turn, role_key)
    content_key = next((key for key in ("content", "value") if turn.get(key) is not None), None)
    if content_key is None:
        content_key = "value" if role_key == "from" and "content" not in turn else "content"
    extras = _extras(record, where, turn)
    if name == "function_call":
        content = ""
        extras["tool_calls"] = read_calls(record, f"{where}.{content_key}", turn.get(content_key))
    else:
        content = _content(record, where, turn, content_key, may_miss="tool_calls" in extras)
    train, weight = read_train(record, turn, where), read_weight(record, turn, where)
    return Message(role, content, train=train, weight=weight, extras=extras)


def read_instruction(record: Record) -> list[Message]:
    """Return Alpaca's question: optional `system` and `history` of pairs, `instruction`, optional `input`.

    Dolly's `context` stands for `input` where there is no `input`. Empty strings are as good as none, because tables
    have no other way of saying so.

    Raises:
        Malformed: If one of them is not what its key says.
    """
    fields = record.fields
    messages = [Message("system", read_text(record, fields, "system"))] if fields.get("system") else []
    history = fields.get("history") or []
    pairs = history if isinstance(history, list) else [history]
    for pair in pairs:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(turn, str) for turn in pair)):
            raise malformed(record, "`history` must be a list of [question, answer] pairs of strings")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    key = "context" if "context" in fields and "input" not in fields else "input"
    context = read_text(record, fields, key) if fields.get(key) is not None else None
    return [*messages, Message("user", read_text(record, fields, "instruction"), context=context or None)]


def with_system(record: Record, turns: list[Message], system: str) -> list[Message]:
    """Return the turns with the record's own system text in front.

    Raises:
        Malformed: If they begin with another one.
    """
    if turns[0].role != "system":
        return [Message("system", system), *turns]
    if turns[0].content == system:
        return turns
    raise malformed(
        record, "the record's `system` and its first turn are two different system texts", "misplaced_system"
    )


def with_tools(turns: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """Return the turns with the tools on offer in their first message."""
    return [replace(turns[0], tools=tools), *turns[1:]] if tools else turns


def _role(record: Record, where: str, turn: Mapping[str, Any], key: str) -> tuple[str, Role]:
    name = turn.get(key)
    if name is None:
        raise malformed(record, f"{where} has no `role` (or `from`); the keys there are: {', '.join(sorted(turn))}")
    known = ROLES.get(name.lower()) if isinstance(name, str) else None
    if known is None:
        unknown = one_of(f"{where}.{key}", name, ROLES)
        raise malformed(record, str(unknown), "unknown_role")
    return name.lower(), known


def _extras(record: Record, where: str, turn: Mapping[str, Any]) -> dict[str, Any]:
    extras: dict[str, Any] = {key: read_text(record, turn, key, where) for key in _EXTRAS if turn.get(key) is not None}
    calls = turn.get("tool_calls") or turn.get("function_call")  # the latter is OpenAI's older way
    if calls:
        extras["tool_calls"] = read_calls(record, f"{where}.tool_calls", calls)
    return extras


def _content(record: Record, where: str, turn: Mapping[str, Any], key: str, *, may_miss: bool) -> str:
    value = turn.get(key)
    if isinstance(value, str):
        return value
    if value is None and may_miss:
        return ""
    if isinstance(value, list):
        return "".join(_part(record, f"{where}.{key}[{i}]", part) for i, part in enumerate(value))
    return read_text(record, turn, key, where)


def _part(record: Record, where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise Malformed(
            f"{record.location}: {where} is of type {kind!r}, but only text is trained on (multimodal data is not "
            "supported); remove the part or set data.malformed: drop"
        )
    return read_text(record, part, "text", where)
