"""Record → list[Message]: one function per format; the longer ones have modules of their own.

Every function checks what it reads and raises `Malformed` with the record's location and a reason. The table in
`message_order` lists what is repaired instead. In every format, a record's `weight` (a number of at least 0) multiplies
the weights of its messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sft_lightning.data.formats.conversation_fields import read_conversation, read_instruction
from sft_lightning.data.formats.deepspeed_chat import DATASETS, dataset_format
from sft_lightning.data.formats.fields import Malformed, actual_value, malformed, read_text, read_train, read_weight
from sft_lightning.data.formats.message_order import repair_order
from sft_lightning.data.formats.preference import preference, preference_pair
from sft_lightning.data.formats.user_format import is_dotted_path, read_with, user_function
from sft_lightning.errors import UserError, one_of
from sft_lightning.types import Message, Record

__all__ = ["FORMATS", "Malformed", "find_format", "preference_pair", "to_messages"]


def alpaca(record: Record) -> list[Message]:
    """Stanford Alpaca: `instruction`, optional `input`, `output`; optional `system` and `history` of pairs.

    Dolly's keys are accepted, too: `response` for `output`, and `context` where there is no `input`.
    """
    output, response = record.fields.get("output"), record.fields.get("response")
    if output is not None and response is not None and output != response:
        raise malformed(record, "`output` and `response` both hold the answer, but they differ")
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

    Optional `system` and `tools` of the record, `train` and `weight` of a message.
    """
    return read_conversation(record, ("conversations", "messages", "conversation"))


def text(record: Record) -> list[Message]:
    """A plain document: `text`, without a template; every token is supervised."""
    return [Message("text", read_text(record, record.fields, "text"))]


def prompt_completion(record: Record) -> list[Message]:
    """A `prompt` and its `completion`, joined without a template; the completion is supervised."""
    prompt = Message("text", read_text(record, record.fields, "prompt"))
    completion = read_text(record, record.fields, "completion")
    if not completion.strip():
        raise malformed(record, "`completion` is empty, so there is nothing to learn", "no_answer")
    return [prompt, Message("text", completion)]


def segments(record: Record) -> list[Message]:
    """Pieces of one text, without a template: `segments` of `text`, `train` (bool) and optional `weight`."""
    pieces = record.fields.get("segments")
    if not isinstance(pieces, list) or not pieces:
        wanted = "a list of objects with `text` and `train`"
        raise malformed(record, f"`segments` must be {wanted}{actual_value(record.fields, 'segments')}")
    return [_segment(record, f"segments[{i}]", piece) for i, piece in enumerate(pieces)]


def _segment(record: Record, where: str, piece: Any) -> Message:
    if not isinstance(piece, dict):
        raise malformed(record, f"{where} must be an object with `text` and `train` (got {type(piece).__name__})")
    train, weight = read_train(record, piece, where), read_weight(record, piece, where)
    return Message("text", read_text(record, piece, "text", where), train=train is not False, weight=weight)


def firefly(record: Record) -> list[Message]:
    """Firefly: `conversation` of `human` and `assistant` pairs, optional `system`; other keys are ignored."""
    pairs = record.fields.get("conversation")
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise malformed(record, "`conversation` must be a list of human and assistant pairs")
    has_system = record.fields.get("system") is not None
    messages = [Message("system", read_text(record, record.fields, "system"))] if has_system else []
    for i, pair in enumerate(pairs):
        messages.append(Message("user", read_text(record, pair, "human", f"conversation[{i}]")))
        messages.append(Message("assistant", read_text(record, pair, "assistant", f"conversation[{i}]")))
    return messages


Format = Callable[[Record], list[Message]]
"""Reads a record in one format."""

_GENERAL = (alpaca, firefly, messages, preference, prompt_completion, segments, sharegpt, text)

FORMATS: Mapping[str, Format] = {
    **{function.__name__: function for function in _GENERAL},
    **{name: dataset.messages for name, dataset in DATASETS.items()},
}
"""The formats by name; a user's own format is the dotted path of a function instead."""

_FORMAT_OF_KEY = {
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
"""The format of a record that has this key; the first key that it has decides."""


def find_format(name: str | None, record: Record, path: str = "") -> str:
    """Return the name of a source's format: the configured one, else the one detected from the path or the keys.

    Args:
        name: The configured format: a key of `FORMATS`, or the dotted path of a function.
        record: The source's first record.
        path: The source's path or Hub id; it may contain the Hub name of a DeepSpeed-Chat data set.

    Raises:
        UserError: If the name is unknown, or the format cannot be detected.
    """
    if name is not None:
        if name not in FORMATS and not is_dotted_path(name):
            raise one_of(f"data.sources.{record.source}.format", name, FORMATS)
        if name not in FORMATS:
            user_function(name, record.source)
        return name
    return dataset_format(path) or _detect(record)


def _detect(record: Record) -> str:
    for key, name in _FORMAT_OF_KEY.items():
        value = record.fields.get(key)
        if value is None:
            continue
        if name == "firefly" and _has_roles(value):
            return "messages"
        if name == "alpaca" and isinstance(record.fields.get("output"), list):
            return "preference"
        if name == "text" and "role" in record.fields:
            continue  # one message of a conversation that is spread over rows (OpenAssistant), not a document
        return name
    raise UserError(
        f"{record.location}: cannot detect the format from the keys {sorted(record.fields)}; set "
        f"data.sources.{record.source}.format to one of {', '.join(sorted(FORMATS))}, or to the dotted path of a "
        "function of your own"
    )


def _has_roles(messages: Any) -> bool:
    return isinstance(messages, list) and any(
        isinstance(message, dict) and ("role" in message or "from" in message) for message in messages
    )


_ANSWER_KEYS = {
    "alpaca": ("output", "response"),
    "preference": ("chosen", "response_j", "output"),
    "prompt_completion": ("completion",),
}
"""The keys of a format's answer, which a question to predict on may lack."""


def to_messages(
    record: Record, format_name: str, *, answered: bool = True, repairs: Counter[str] | None = None
) -> list[Message]:
    """Return a record's messages, checked and in a valid order.

    Args:
        record: The record.
        format_name: A key of `FORMATS`, or the dotted path of a user's own function.
        answered: Whether there must be an answer to learn from; a question to predict on needs none.
        repairs: Counts what was repaired, by code: `leading_answer`, `trailing_user`, `empty_turn`.

    Raises:
        Malformed: If the record does not fit the format, has nothing to learn from, or its messages are out of order.
        UserError: If a user's own function does not exist, fails, or returns something else.
    """
    messages = _read(record, format_name, answered)
    for message in messages:
        _check_unicode(record, message.content)
        _check_unicode(record, message.context or "")
    weight = read_weight(record, record.fields)
    if weight != 1:
        messages = [replace(message, weight=weight * message.weight) for message in messages]
    return repair_order(record, messages, answered=answered, repairs=repairs)


def _check_unicode(record: Record, text: str) -> None:
    """Refuse an unpaired surrogate: JSON can hold it (`"\\ud83d"`), but it is not a character, so it has no tokens."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"{text[error.start]!r} at character {error.start}"
        raise malformed(record, f"a text is not valid Unicode: an unpaired surrogate ({where})") from error


def _read(record: Record, name: str, answered: bool) -> list[Message]:
    if name not in FORMATS:
        return read_with(name, record)
    if answered or not _lacks_answer(record, name):
        return FORMATS[name](record)
    if name in DATASETS:
        return DATASETS[name].question(record)
    with_answer = {**record.fields, _ANSWER_KEYS[name][0]: "?"}
    question = FORMATS[name](replace(record, fields=with_answer))[:-1]
    return [replace(message, train=False) if message.role == "text" else message for message in question]


def _lacks_answer(record: Record, name: str) -> bool:
    if name in DATASETS:
        try:
            DATASETS[name].messages(record)
        except Malformed:
            return True
        return False
    keys = _ANSWER_KEYS.get(name, ())
    return bool(keys) and not any(record.fields.get(key) for key in keys)
