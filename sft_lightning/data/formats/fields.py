"""What a record's fields hold, checked: the error when they do not hold what the format says."""

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
"""Why a record cannot be learned from; the codes of the data report."""

_REMEDIES = "fix the record or set data.malformed: drop"


class Malformed(UserError):  # noqa: N818  # the word of `data.malformed`
    """A record that does not fit its format; `data.malformed: drop` leaves it out and counts it under its reason."""

    reason: Reason
    """The code under which the record is counted."""

    # The default is what unpickling needs: an exception comes back from another process as `cls(*args)`.
    def __init__(self, message: str, reason: Reason = "broken_record") -> None:
        super().__init__(message)
        self.reason = reason


def malformed(record: Record, problem: str, reason: Reason = "broken_record", *, remedy: str = "") -> Malformed:
    """Return the error for a record: where it stands, what is wrong with it, and what to do.

    Args:
        record: The record.
        problem: What is wrong with it.
        reason: The code under which it is counted if it is dropped.
        remedy: What else the user can do than to fix the record or drop it.
    """
    separator = " " if problem.endswith(".") else "; "
    remedies = f"{remedy}, {_REMEDIES}" if remedy else _REMEDIES
    return Malformed(f"{record.location}: {problem}{separator}{remedies}", reason)


def read_text(record: Record, fields: Mapping[str, Any], key: str, where: str = "") -> str:
    """Return the string under `key`.

    Args:
        record: The row, for messages.
        fields: The row's fields, or an object within them.
        key: The key to read.
        where: The path of `fields` within the row, for messages: `messages[3]`.

    Raises:
        Malformed: If there is no such key, or its value is not a string.
    """
    value = fields.get(key)
    if isinstance(value, str):
        return value
    name = f"{where}.{key}" if where else key
    if key not in fields:
        raise malformed(record, f"`{name}` is missing; the keys there are: {', '.join(sorted(fields))}")
    raise malformed(record, f"`{name}` must be a string, not {type(value).__name__}")


def read_weight(record: Record, fields: Mapping[str, Any], where: str = "") -> float:
    """Return the loss weight under `weight`: 1 where there is none; a number in a string is one, as CSV has no other.

    Raises:
        Malformed: If it is not a finite number of at least 0.
    """
    weight = fields.get("weight")
    if weight is None or weight == "":  # what tables hold where another record has a weight
        return 1.0
    if isinstance(weight, str):
        weight = _number(weight)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        name = f"{where}.weight" if where else "weight"
        raise malformed(record, f"{name} must be a number of at least 0, not {weight!r}")
    return float(weight)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def read_train(record: Record, fields: Mapping[str, Any], where: str) -> bool | None:
    """Return whether the turn says itself that it is supervised, or not; `None` where it says nothing.

    Raises:
        Malformed: If it says something else.
    """
    train = fields.get("train")
    if train is not None and not isinstance(train, bool):
        raise malformed(record, f"{where}.train must be true or false, not {train!r}")
    return train


def found(fields: Mapping[str, Any], key: str) -> str:
    """Return what stands under `key` instead of what was looked for, as the end of a message."""
    if key in fields:
        return f", not {type(fields[key]).__name__}"
    return f"; the record's keys are: {', '.join(sorted(fields))}"
