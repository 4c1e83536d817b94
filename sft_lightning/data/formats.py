"""Record → list[Message], one function a format.

Every function checks what it reads and raises with the record's location; nothing is skipped or repaired in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sft_lightning.errors import UserError, one_of
from sft_lightning.types import Message, Record, Role

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def alpaca(record: Record) -> list[Message]:
    """Stanford Alpaca: `instruction`, optional `input`, `output`; optional `system` and `history` of pairs."""
    messages: list[Message] = []
    if record.fields.get("system"):
        messages.append(Message("system", _text(record, record.fields, "system")))
    for pair in record.fields.get("history") or []:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(turn, str) for turn in pair)):
            raise UserError(f"{record.location}: `history` must be a list of [question, answer] pairs of strings")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    context = record.fields.get("input")
    if context is not None and not isinstance(context, str):
        raise UserError(f"{record.location}: `input` must be a string, not {type(context).__name__}")
    messages.append(Message("user", _text(record, record.fields, "instruction"), context=context or None))
    messages.append(Message("assistant", _text(record, record.fields, "output")))
    return messages


def messages(record: Record) -> list[Message]:
    """OpenAI chat: `messages` of `role` and `content`; optional `train` and `weight` for each message."""
    return _turns(record, "messages", role_key="role", content_key="content")


def sharegpt(record: Record) -> list[Message]:
    """ShareGPT: `conversations` of `from` (human, gpt, system) and `value`; a leading answer is left out."""
    turns = _turns(record, "conversations", role_key="from", content_key="value")
    first_question = next((i for i, turn in enumerate(turns) if turn.role != "assistant"), len(turns))
    return turns[first_question:]


def text(record: Record) -> list[Message]:
    """A plain document: `text`; no template, every token supervised."""
    return [Message("text", _text(record, record.fields, "text"))]


def prompt_completion(record: Record) -> list[Message]:
    """A `prompt` and its `completion`, one after the other as they stand: no template, the completion supervised."""
    prompt = Message("text", _text(record, record.fields, "prompt"), train=False)
    return [prompt, Message("text", _text(record, record.fields, "completion"), train=True)]


def segments(record: Record) -> list[Message]:
    """Pieces of one text: `segments` of `text`, `train` (bool) and optional `weight`; no template."""
    return _turns(record, "segments", role_key=None, content_key="text")


def firefly(record: Record) -> list[Message]:
    """Firefly: `conversation` of `human` and `assistant` pairs, optional `system`; other keys are not looked at."""
    pairs = record.fields.get("conversation")
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise UserError(f"{record.location}: `conversation` must be a list of human and assistant pairs")
    turns = [Message("system", _text(record, record.fields, "system"))] if record.fields.get("system") else []
    for i, pair in enumerate(pairs):
        turns.append(Message("user", _text(record, pair, "human", f"conversation[{i}]")))
        turns.append(Message("assistant", _text(record, pair, "assistant", f"conversation[{i}]")))
    return turns


Format = Callable[[Record], list[Message]]

FORMATS: Mapping[str, Format] = {
    function.__name__: function for function in (alpaca, firefly, messages, prompt_completion, segments, sharegpt, text)
}

_TELLING_KEY = {
    "messages": "messages",
    "conversations": "sharegpt",
    "conversation": "firefly",
    "segments": "segments",
    "instruction": "alpaca",
    "completion": "prompt_completion",
    "text": "text",
}


def find_format(name: str | None, record: Record) -> str:
    """Return the format's name: `name` if given, else the one that the record's keys tell.

    Raises:
        UserError: If the name is unknown, or no key tells the format.
    """
    if name is not None:
        if name not in FORMATS:
            raise one_of(f"data.sources.{record.source}.format", name, FORMATS)
        return name
    for key, found in _TELLING_KEY.items():
        if key in record.fields:
            return found
    raise UserError(
        f"{record.location}: cannot tell the format from the keys {sorted(record.fields)}; "
        f"set data.sources.{record.source}.format to one of {', '.join(sorted(FORMATS))}"
    )


_ANSWER_KEY = {"alpaca": "output", "prompt_completion": "completion"}


def to_messages(record: Record, format_name: str, *, answered: bool = True) -> list[Message]:
    """Apply a format and check what every template relies on.

    Args:
        record: The row.
        format_name: A key of `FORMATS`.
        answered: Whether the record must hold an answer to learn from; a question to predict on need not.

    Raises:
        UserError: If the record does not fit the format, has no turn to learn from, or its turns do not alternate.
    """
    key = _ANSWER_KEY.get(format_name)
    if not answered and key is not None and record.fields.get(key) is None:
        return FORMATS[format_name](replace(record, fields={**record.fields, key: ""}))[:-1]
    turns = FORMATS[format_name](record)
    _check_order(record, turns)
    if answered and not any(turn.role in ("assistant", "text") for turn in turns):
        raise UserError(f"{record.location}: no assistant turn, so nothing to learn; remove the record")
    return turns


def _check_order(record: Record, turns: list[Message]) -> None:
    """System first if at all, then user and assistant in turn; a document stands alone."""
    previous: Role | None = None
    for number, turn in enumerate(turns):
        starts = previous in (None, "system")
        if turn.role == "system" and number > 0:
            raise UserError(f"{record.location}: turn {number} is a system turn; it must be the first")
        if turn.role == "user" and previous == "user":
            raise UserError(f"{record.location}: turns {number - 1} and {number} are both the user's; join them")
        if turn.role == "assistant" and (starts or previous == "assistant"):
            raise UserError(f"{record.location}: turn {number} is an answer without a question before it")
        previous = turn.role


def _turns(record: Record, key: str, *, role_key: str | None, content_key: str) -> list[Message]:
    turns = record.fields.get(key)
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{record.location}: `{key}` must be a list of turns{_found(record, key)}")
    return [_turn(record, f"{key}[{i}]", turn, role_key, content_key) for i, turn in enumerate(turns)]


def _turn(record: Record, where: str, turn: Any, role_key: str | None, content_key: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(
            f"{record.location}: {where} must be an object with `{role_key or 'train'}` and `{content_key}`"
        )
    role = _role(record, where, turn, role_key)
    train, weight = turn.get("train"), turn.get("weight")
    weight = 1.0 if weight is None else weight  # columns of Parquet hold null where another message has a weight
    if train is not None and not isinstance(train, bool):
        raise UserError(f"{record.location}: {where}.train must be true or false, not {train!r}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise UserError(f"{record.location}: {where}.weight must be a number of at least 0, not {weight!r}")
    return Message(role, _text(record, turn, content_key, where), train=train, weight=float(weight))


def _role(record: Record, where: str, turn: Mapping[str, Any], role_key: str | None) -> Role:
    if role_key is None:
        return "text"
    role = turn.get(role_key)
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise one_of(f"{record.location}: {where}.{role_key}", role, _ROLES)
    return known


def _text(record: Record, fields: Mapping[str, Any], key: str, where: str = "") -> str:
    value = fields.get(key)
    if isinstance(value, str):
        return value
    name = f"{where}.{key}" if where else key
    if key not in fields:
        raise UserError(f"{record.location}: `{name}` is missing; the keys there are: {', '.join(sorted(fields))}")
    raise UserError(f"{record.location}: `{name}` must be a string, not {type(value).__name__}")


def _found(record: Record, key: str) -> str:
    if key in record.fields:
        return f", not {type(record.fields[key]).__name__}"
    return f"; the record's keys are: {', '.join(sorted(record.fields))}"
