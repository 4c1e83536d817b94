"""Errors that the user can fix.

A `UserError` ends a command with exit status 2 and one message. Any other exception is a bug of ours: it keeps its
traceback and ends the command with exit status 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The command, the YAML or the data is wrong.

    The message names the YAML key (or the file and line), the value, and the way out.
    """


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Suggest the choice that is nearest to a misspelt word.

    Args:
        word: What the user wrote.
        choices: The words that are valid.

    Returns:
        ` Did you mean 'x'?`, or an empty string if no choice is near.
    """
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


def one_of(key: str, value: object, choices: Iterable[str]) -> UserError:
    """Make the error for a value that is not among the valid ones.

    Args:
        key: The YAML key.
        value: The user's value.
        choices: The valid values.

    Returns:
        The error, with the nearest valid value and all of them.
    """
    known = sorted(choices)
    return UserError(f"{key}: {value!r} is unknown.{did_you_mean(str(value), known)} Known: {', '.join(known)}.")
