"""Record → list[Message], one function a format; the longer ones have modules of their own.

Every function checks what it reads and raises `Malformed` with the record's location and a reason. What is repaired
instead, and what the order of turns must be, says the table of `turn_order`; nothing is left out uncounted.

A record's own `weight` (a number of at least 0) multiplies the weights of its messages, in every format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sft_lightning.data.formats.conversation_fields import read_conversation, read_instruction
from sft_lightning.data.formats.deepspeed_chat import DATASETS, dataset_format
from sft_lightning.data.formats.fields import Malformed, found, malformed, read_text, read_train, read_weight
from sft_lightning.data.formats.preference import preference, preference_pair
from sft_lightning.data.formats.turn_order import settle
from sft_lightning.data.formats.user_format import is_dotted_path, read_with, user_function
from sft_lightning.errors import UserError, one_of
from sft_lightning.types import Message, Record

__all__ = ["FORMATS", "Malformed", "find_format", "preference_pair", "to_messages"]


def alpaca(record: Record) -> list[Message]:
    """Stanford Alpaca: `instruction`, optional `input`, `output`; optional `system` and `history` of pairs.

    `response` is another word for `output`, and `context` for an absent `input` (Dolly).
    """
    output, response = record.fields.get("output"), record.fields.get("response")
    if output is not None and response is not None and output != response:
        raise malformed(record, "`output` and `response` are two words for the answer, but hold two different ones")
    key = "response" if output is None and response is not None else "output"
    return [*read_instruction(record), Message("assistant", read_text(record, record.fields, key))]


def messages(record: Record) -> list[Message]:
    """OpenAI chat: `messages` of `role` and `content`, with tool calls; optional `system` and `tools` of the record.

    A message may have `train`, `weight`, `tool_calls`, `tool_call_id`, `name` and `reasoning_content`; its content is a
    string or a list of text parts.
    """
    return read_conversation(record, ("messages", "conversations", "conversation"))


def sharegpt(record: Record) -> list[Message]:
    """ShareGPT: `conversations` of `from` (human, gpt, system, function_call, observation) and `value`.

    Optional `system` and `tools` of the record, `train` and `weight` of a turn.
    """
    return read_conversation(record, ("conversations", "messages", "conversation"))


def text(record: Record) -> list[Message]:
    """A plain document: `text`; no template, every token supervised."""
    return [Message("text", read_text(record, record.fields, "text"))]


def prompt_completion(record: Record) -> list[Message]:
    """A `prompt` and its `completion`, one after the other as they stand: no template, the completion supervised."""
    prompt = Message("text", read_text(record, record.fields, "prompt"))
    completion = read_text(record, record.fields, "completion")
    if not completion.strip():
        raise malformed(record, "`completion` is empty, so there is nothing to learn", "no_answer")
    return [prompt, Message("text", completion)]


def segments(record: Record) -> list[Message]:
    """Pieces of one text: `segments` of `text`, `train` (bool) and optional `weight`; no template."""
    pieces = record.fields.get("segments")
    if not isinstance(pieces, list) or not pieces:
        raise malformed(record, f"`segments` must be a list of pieces{found(record.fields, 'segments')}")
    return [_segment(record, f"segments[{i}]", piece) for i, piece in enumerate(pieces)]


def _segment(record: Record, where: str, piece: Any) -> Message:
    if not isinstance(piece, dict):
        raise malformed(record, f"{where} must be an object with `text` and `train`, not {type(piece).__name__}")
    train, weight = read_train(record, piece, where), read_weight(record, piece, where)
    return Message("text", read_text(record, piece, "text", where), train=train is not False, weight=weight)


def firefly(record: Record) -> list[Message]:
    """Firefly: `conversation` of `human` and `assistant` pairs, optional `system`; other keys are not looked at."""
    pairs = record.fields.get("conversation")
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise malformed(record, "`conversation` must be a list of human and assistant pairs")
    has_system = record.fields.get("system") is not None
    turns = [Message("system", read_text(record, record.fields, "system"))] if has_system else []
    for i, pair in enumerate(pairs):
        turns.append(Message("user", read_text(record, pair, "human", f"conversation[{i}]")))
        turns.append(Message("assistant", read_text(record, pair, "assistant", f"conversation[{i}]")))
    return turns


Format = Callable[[Record], list[Message]]

_GENERAL = (alpaca, firefly, messages, preference, prompt_completion, segments, sharegpt, text)

FORMATS: Mapping[str, Format] = {
    **{function.__name__: function for function in _GENERAL},
    **{name: dataset.messages for name, dataset in DATASETS.items()},
}
"""By name; besides these, a format may be the dotted path of a user's own function."""

_TELLING_KEY = {
    "chosen": "preference",
    "response_j": "preference",
    "messages": "messages",
    "conversations": "sharegpt",
    "conversation": "firefly",
    "segments": "segments",
    "instruction": "alpaca",
    "completion": "prompt_completion",
    "text": "text",
}


def find_format(name: str | None, record: Record, path: str = "") -> str:
    """Return the format's name: `name` if given, else a DeepSpeed-Chat dataset's, else the one that the keys tell.

    Args:
        name: As configured: a key of `FORMATS`, or the dotted path of a function.
        record: The source's first row.
        path: The source's path or Hub id; the Hub name of a DeepSpeed-Chat dataset within it tells the format.

    Raises:
        UserError: If the name is unknown, or nothing tells the format.
    """
    if name is not None:
        if name not in FORMATS and not is_dotted_path(name):
            raise one_of(f"data.sources.{record.source}.format", name, FORMATS)
        if name not in FORMATS:
            user_function(name, record.source)
        return name
    return dataset_format(path) or _told_by_keys(record)


def _told_by_keys(record: Record) -> str:
    for key, told in _TELLING_KEY.items():
        value = record.fields.get(key)
        if value is None:
            continue
        if told == "firefly" and _has_roles(value):
            return "messages"
        if told == "alpaca" and isinstance(record.fields.get("output"), list):
            return "preference"
        if told == "text" and "role" in record.fields:
            continue  # one message of a conversation that is spread over rows (OpenAssistant), not a document
        return told
    raise UserError(
        f"{record.location}: cannot tell the format from the keys {sorted(record.fields)}; set "
        f"data.sources.{record.source}.format to one of {', '.join(sorted(FORMATS))}, or to the dotted path of your "
        "own function"
    )


def _has_roles(turns: Any) -> bool:
    return isinstance(turns, list) and any(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns
    )


_ANSWER_KEYS = {
    "alpaca": ("output", "response"),
    "preference": ("chosen", "response_j", "output"),
    "prompt_completion": ("completion",),
}
"""Where a format's answer stands; a question to predict on may lack it."""


def to_messages(
    record: Record, format_name: str, *, answered: bool = True, repairs: Counter[str] | None = None
) -> list[Message]:
    """Apply a format, and see to it that what every template relies on is so.

    Args:
        record: The row.
        format_name: A key of `FORMATS`, or the dotted path of a user's own function.
        answered: Whether the record must hold an answer to learn from; a question to predict on need not.
        repairs: Counts what was repaired, by code: `leading_answer`, `trailing_user`, `empty_turn` (see `turn_order`).

    Raises:
        Malformed: If the record does not fit the format, has nothing to learn from, or its turns are out of order.
        UserError: If a user's own function does not exist, fails, or returns something else.
    """
    turns = _read(record, format_name, answered)
    for turn in turns:
        _check_unicode(record, turn.content)
        _check_unicode(record, turn.context or "")
    weight = read_weight(record, record.fields)
    if weight != 1:
        turns = [replace(turn, weight=weight * turn.weight) for turn in turns]
    return settle(record, turns, answered=answered, repairs=repairs)


def _check_unicode(record: Record, text: str) -> None:
    """JSON can hold half of a surrogate pair (`"\\ud83d"`), which is no character and cannot be tokenized."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"half of a surrogate pair ({text[error.start]!r} at character {error.start}), which is no character"
        raise malformed(record, f"a text holds {half}") from error


def _read(record: Record, name: str, answered: bool) -> list[Message]:
    if name not in FORMATS:
        return read_with(name, record)
    if answered or not _lacks_answer(record, name):
        return FORMATS[name](record)
    if name in DATASETS:
        return DATASETS[name].question(record)
    stand_in = {**record.fields, _ANSWER_KEYS[name][0]: "?"}
    question = FORMATS[name](replace(record, fields=stand_in))[:-1]
    return [replace(turn, train=False) if turn.role == "text" else turn for turn in question]


def _lacks_answer(record: Record, name: str) -> bool:
    if name in DATASETS:
        try:
            DATASETS[name].messages(record)
        except Malformed:
            return True
        return False
    keys = _ANSWER_KEYS.get(name, ())
    return bool(keys) and not any(record.fields.get(key) for key in keys)
