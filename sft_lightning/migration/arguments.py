"""What was given to another system: a script, a command line or a JSON file → options by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_lightning.errors import UserError
from sft_lightning.migration.shell import command_words, split_launcher, training_words

_FALSE = ("false", "0", "no", "f", "n")


@dataclass(frozen=True)
class Given:
    """Options as another system's user wrote them."""

    options: Mapping[str, list[str]]
    """By name, without dashes; a bare flag has no values."""

    launcher: Mapping[str, list[str]] = field(default_factory=dict)
    """Options of `deepspeed`, `torchrun` or `accelerate`."""

    program: str = ""
    """The Python file that was run."""


def read_given(args: Sequence[str]) -> Given:
    """Read what follows the system's name: a file (script or JSON), a command in one word, or a command's words.

    Raises:
        UserError: If there is nothing, or it cannot be read.
    """
    if not args:
        raise UserError("migrate: give a shell script, a JSON file, or the command itself after the system's name")
    if len(args) > 1:
        return _of_words(list(args), Path())
    path = Path(args[0]).expanduser()
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return _of_json(text, str(path))
        return _of_words(training_words(text, str(path)), path.parent)
    if " " in args[0].strip() or args[0].startswith("--"):
        words = command_words(args[0].replace("\\\n", " "), "the command") or args[0].split()
        return _of_words(words, Path())
    raise UserError(f"migrate: there is no file {args[0]!r} (looked in {Path.cwd()}); give a script, JSON or a command")


def _of_words(words: list[str], folder: Path) -> Given:
    launcher, program, arguments = split_launcher(words)
    options = _options(arguments)
    files = options.get("train_args_file") or ([arguments[0]] if len(arguments) == 1 else [])
    if files and files[0].endswith(".json"):
        inside = _of_json(*_json_file(files[0], folder))
        return Given(inside.options, _options(launcher), program)
    return Given(options, _options(launcher), program)


def _json_file(name: str, folder: Path) -> tuple[str, str]:
    for path in (Path(name), folder / name):
        if path.is_file():
            return path.read_text(encoding="utf-8"), str(path)
    raise UserError(f"migrate: the options are in {name!r}, which is not here (looked in {Path.cwd()}); give that file")


def _of_json(text: str, where: str) -> Given:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: must be an object of options, not {type(values).__name__}")
    return Given({name: _words_of(value) for name, value in values.items() if value is not None})


def _words_of(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [json.dumps(each) if isinstance(each, dict) else str(each) for each in values]


def _options(words: Sequence[str]) -> dict[str, list[str]]:
    options: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            options[name] = [value] if equals else []
        elif name:
            options[name].append(word)
    return options


def is_true(values: Sequence[str]) -> bool:
    """Whether a flag is on: bare, or with a value that is not a no."""
    return not values or values[0].lower() not in _FALSE
