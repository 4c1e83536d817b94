"""Read the options of another system from a shell script, a command line or a JSON file."""

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
class GivenOptions:
    """Options of another system as its user wrote them."""

    options: Mapping[str, list[str]]
    """Values of each option by its name without dashes; a bare flag has no values."""

    launcher: Mapping[str, list[str]] = field(default_factory=dict)
    """Options of the launcher: `deepspeed`, `torchrun` or `accelerate`."""

    program: str = ""
    """The Python file of the command, if there is one."""


def read_options(args: Sequence[str]) -> GivenOptions:
    """Return the options of a shell script, a JSON file or a command.

    Args:
        args: What follows the system's name: a script with its own arguments, a JSON file, a command in one word, or
            the words of a command.

    Raises:
        UserError: If `args` is empty, or if it is neither a readable file nor a command.
    """
    if not args:
        raise UserError("migrate: after the name of the system, give a shell script, a JSON file or a command")
    path = Path(args[0]).expanduser()
    if path.suffix == ".sh" and path.is_file():
        return _from_words(training_words(path.read_text(encoding="utf-8"), str(path), args[1:]), path.parent)
    if len(args) > 1:
        return _from_words(list(args), Path())
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return _from_json(text, str(path))
        return _from_words(training_words(text, str(path)), path.parent)
    if " " in args[0].strip() or args[0].startswith("--"):
        words = command_words(args[0].replace("\\\n", " "), "the command") or args[0].split()
        return _from_words(words, Path())
    raise UserError(f"migrate: {args[0]!r} does not exist (looked in {Path.cwd()}); give a script, JSON or a command")


def _from_words(words: list[str], folder: Path) -> GivenOptions:
    launcher, program, arguments = split_launcher(words)
    options = _by_name(arguments)
    files = options.get("train_args_file") or ([arguments[0]] if len(arguments) == 1 else [])
    if files and files[0].endswith(".json"):
        in_file = _from_json(*_read_argument_file(files[0], folder))
        return GivenOptions(in_file.options, _by_name(launcher), program)
    return GivenOptions(options, _by_name(launcher), program)


def _read_argument_file(name: str, folder: Path) -> tuple[str, str]:
    for path in (Path(name), folder / name):
        if path.is_file():
            return path.read_text(encoding="utf-8"), str(path)
    raise UserError(f"migrate: the command reads its options from {name!r}, which does not exist; give that file")


def _from_json(text: str, where: str) -> GivenOptions:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, line {error.lineno}, column {error.colno}: invalid JSON: {error.msg}") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: must be a JSON object of options (got {type(values).__name__})")
    return GivenOptions({name: _as_words(value) for name, value in values.items() if value is not None})


def _as_words(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [json.dumps(each) if isinstance(each, dict) else str(each) for each in values]


def _by_name(words: Sequence[str]) -> dict[str, list[str]]:
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
    """Whether a flag is on: it has no value, or a value other than false, 0, no, f and n."""
    return not values or values[0].lower() not in _FALSE
