"""Reads and checks a record's fields; the error for a field that does not fit the format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from sft_lightning.errors import UserError
from sft_lightning.types import Record

Reason = Literal[
    "broken_record",
    "unknown_role",
    "misplaced_system",
    "misplaced_tool",
    "consecutive_turns",
    "no_question",
    "no_answer",
    "different_prompts",
    "same_answers",
    "rewritten_pair",
]
"""Why nothing can be learned from a record: the codes of the data report."""

_REMEDIES = "fix the record or set data.malformed: drop"


class Malformed(UserError):  # noqa: N818  # the word of `data.malformed`
    """A record that does not fit its format; `data.malformed: drop` drops it and counts it under its reason.

    Args:
        message: What is wrong, with the record's location.
        reason: The code under which the record is counted.
    """

    reason: Reason
    """The code under which the record is counted."""

    # Unpickling needs the default: an exception comes back from another process as `cls(*args)`.
    def __init__(self, message: str, reason: Reason = "broken_record") -> None:
        super().__init__(message)
        self.reason = reason


def malformed(record: Record, problem: str, reason: Reason = "broken_record", *, remedy: str = "") -> Malformed:
    """Return the error for a record: its location, what is wrong with it, and what to do.

    Args:
        record: The record.
        problem: What is wrong with it.
        reason: The code under which it is counted if it is dropped.
        remedy: What the user can do besides fixing or dropping the record.
    """
    separator = " " if problem.endswith(".") else "; "
    remedies = f"{remedy}, {_REMEDIES}" if remedy else _REMEDIES
    return Malformed(f"{record.location}: {problem}{separator}{remedies}", reason)


def read_text(record: Record, fields: Mapping[str, Any], key: str, where: str = "") -> str:
    """Return the string under a key.

    Args:
        record: The record, for messages.
        fields: The record's fields, or an object within them.
        key: The key to read.
        where: The path of `fields` within the record, for messages: `messages[3]`.

    Raises:
        Malformed: If the key is missing, or its value is not a string.
    """
    value = fields.get(key)
    if isinstance(value, str):
        return value
    name = f"{where}.{key}" if where else key
    if key not in fields:
        raise malformed(record, f"`{name}` is missing; the keys are: {', '.join(sorted(fields))}")
    raise malformed(record, f"`{name}` must be a string (got {type(value).__name__})")


def read_weight(record: Record, fields: Mapping[str, Any], where: str = "") -> float:
    """Return the loss weight under `weight`, 1 if there is none; CSV files hold it as a string.

    Args:
        record: The record, for messages.
        fields: The record's fields, or an object within them.
        where: The path of `fields` within the record, for messages.

    Raises:
        Malformed: If it is not a finite number of at least 0.
    """
    weight = fields.get("weight")
    if weight is None or weight == "":  # a column of a table that only other records use
        return 1.0
    if isinstance(weight, str):
        weight = _as_number(weight)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        name = f"{where}.weight" if where else "weight"
        raise malformed(record, f"{name} must be a number of at least 0 (got {weight!r})")
    return float(weight)


def _as_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def read_train(record: Record, fields: Mapping[str, Any], where: str) -> bool | None:
    """Return the message's own `train`; `None` if it has none.

    Args:
        record: The record, for messages.
        fields: The message as stored.
        where: The path of `fields` within the record, for messages.

    Raises:
        Malformed: If it is neither true nor false.
    """
    train = fields.get("train")
    if train is not None and not isinstance(train, bool):
        raise malformed(record, f"{where}.train must be true or false (got {train!r})")
    return train


def actual_value(fields: Mapping[str, Any], key: str) -> str:
    """Return the end of a message that says what a key holds: the type of its value, or the keys that exist.

    Args:
        fields: The record's fields.
        key: The key whose value does not fit.
    """
    if key in fields:
        return f" (got {type(fields[key]).__name__})"
    return f"; the record's keys are: {', '.join(sorted(fields))}"
