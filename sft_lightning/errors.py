"""What the user got wrong, said once and clearly.

A `UserError` becomes exit status 2 and one message; any other exception is our own failure and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something in the command, the YAML or the data is wrong.

    The message names the YAML key (or the file and line), the value, and the way out.
    """


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the choice nearest to `word`, or an empty string if none is near."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


def one_of(key: str, value: object, choices: Iterable[str]) -> UserError:
    """The error for a `value` of `key` that is not one of `choices`."""
    known = sorted(choices)
    return UserError(f"{key}: {value!r} is unknown.{did_you_mean(str(value), known)} Known: {', '.join(known)}.")
