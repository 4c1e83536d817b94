"""Errors that the user can fix.

A `UserError` ends a command with exit status 2 and one message. Any other exception is a bug of this package: it keeps
its traceback and ends the command with exit status 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """The command, the YAML or the data is wrong.

    The message names the YAML key (or the file and line), the value, and what to do.
    """


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Suggest the valid word that is nearest to a misspelt one.

    Args:
        word: What the user wrote.
        choices: The words that are valid.

    Returns:
        ` Did you mean 'x'?`, or an empty string if no valid word is near.
    """
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


def one_of(key: str, value: object, choices: Iterable[str]) -> UserError:
    """Return the error for a value that is not among the valid ones.

    Args:
        key: The YAML key.
        value: The user's value.
        choices: The valid values.

    Returns:
        The error; its message suggests the nearest valid value and lists all of them.
    """
    known = sorted(choices)
    return UserError(f"{key}: {value!r} is unknown.{did_you_mean(str(value), known)} Known: {', '.join(known)}.")


def shortened(text: str, limit: int = 60) -> str:
    """Return a text for a message, cut after some characters.

    Args:
        text: Any text.
        limit: The most characters to return.
    """
    return text if len(text) <= limit else text[: limit - 1] + "…"


def few(names: Sequence[str], limit: int = 3) -> str:
    """Return the first names for a message, and `…` in place of the others.

    Args:
        names: Any names.
        limit: The most names to return.
    """
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


@contextmanager
def clear_load_errors(
    key: str, what: str, name_or_path: str, files: Sequence[str] = (), also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn what transformers and PEFT raise for a wrong name or folder into one message.

    Args:
        key: The YAML key or option that names it.
        what: What is loaded: `model`, `tokenizer` or `adapter`.
        name_or_path: Folder or Hub id.
        files: Files of which a local folder must hold at least one; empty for no check.
        also: Further exceptions that mean a wrong name or folder.

    Raises:
        UserError: If the folder does not exist, holds none of `files`, or the block fails.
    """
    folder = Path(name_or_path).expanduser()
    looks_local = folder.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if looks_local and not folder.is_dir():
        raise UserError(f"{key}: the folder {name_or_path!r} does not exist (looked in {Path.cwd()})")
    if files and folder.is_dir() and not any((folder / name).is_file() for name in files):
        raise UserError(
            f"{key}: the folder {name_or_path!r} is not a model with its tokenizer: it has no {' or '.join(files)} "
            f"(it holds: {_listing(folder)})"
        )
    errors: tuple[type[Exception], ...] = (OSError, ValueError, ImportError, TypeError, *also)
    try:
        yield
    except UserError:
        raise
    except errors as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{key}: cannot load {_article(what)} {what} from {name_or_path!r}: {first_line}") from error


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _listing(folder: Path) -> str:
    return few(sorted(path.name for path in folder.iterdir()), 8) or "nothing"
