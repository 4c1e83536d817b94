"""Writes docs/configuration.md from the code: every key under `model` and `data`, its type, default and meaning.

python docs/generate.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import docstring_parser

from sft_lightning.data.pairs.spec import PairDataSpec
from sft_lightning.data.spec import DataSpec
from sft_lightning.training.spec import PreferenceSpec, TrainingSpec

PAGE = Path(__file__).parent / "configuration.md"

_INTRODUCTION = """\
# Configuration

Every key under `model` and `data`. The other top-level keys are `task` (`sft`, `pretrain` or `dpo`),
`seed_everything`, `ckpt_path` (a checkpoint, or `last`) and `trainer`, which takes every option of
[Lightning's Trainer](https://lightning.ai/docs/pytorch/stable/common/trainer.html). On the command line, write
`--model.adapter.r 8`. `python -m sft_lightning fit --help` prints the same descriptions. `make docs` writes this page.
"""

_KEYS_BELOW = "the keys below"

_SET_BY_OTHERS = re.compile(r"^Set by ")
"""Arguments of the data that the command line links to other keys."""


class Key(NamedTuple):
    """A key of the configuration."""

    name: str
    type: str
    default: str
    meaning: str


def keys_of(owner: type, prefix: str, listed: dict[type, str] | None = None) -> Iterator[Key]:
    """Yield the keys of a dataclass; a key whose value has keys is followed by those, unless they are listed already.

    Args:
        owner: The dataclass.
        prefix: Dotted key of its value.
        listed: Classes whose keys were yielded, with the key under which they were.
    """
    listed = {} if listed is None else listed
    meanings = _meanings(owner)
    hints = typing.get_type_hints(owner)
    for name, parameter in inspect.signature(owner).parameters.items():
        if _SET_BY_OTHERS.match(meanings.get(name, "")):
            continue
        hint = hints[name]
        inner = _configuration_in(hint)
        mapped = typing.get_origin(_without_none(hint)) is dict and inner is not None
        key = f"{prefix}.{name}"
        value = _in_words(hint)
        if inner in listed:
            value = value.replace(_KEYS_BELOW, f"the keys of `{listed[inner]}`")
        yield Key(key, value, _default(parameter, inner), meanings.get(name, ""))
        if inner is not None and inner not in listed:
            listed[inner] = f"{key}.<name>" if mapped else key
            yield from keys_of(inner, listed[inner], listed)


def _meanings(owner: type) -> Mapping[str, str]:
    """Return what the docstrings of a class and its bases say about arguments and attributes."""
    parsed = [
        docstring_parser.parse_from_object(each)
        for each in reversed(owner.__mro__)
        if each.__module__.startswith("sft_lightning")
    ]
    return {each.arg_name: " ".join((each.description or "").split()) for doc in parsed for each in doc.params}


def _without_none(hint: Any) -> Any:
    arguments = [each for each in typing.get_args(hint) if each is not type(None)]
    return arguments[0] if _is_union(hint) and len(arguments) == 1 else hint


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _configuration_in(hint: Any) -> type | None:
    """Return the dataclass of ours that a type is, or has as the value of a dictionary."""
    hint = _without_none(hint)
    if typing.get_origin(hint) is dict:
        hint = typing.get_args(hint)[1]
    return hint if _is_ours(hint) else None


def _is_ours(hint: Any) -> typing.TypeGuard[type]:
    return dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint.__module__.startswith("sft_lightning")


def _in_words(hint: Any) -> str:
    """Return a type as a reader of YAML knows it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin is typing.Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if _is_union(hint):
        return " or ".join(dict.fromkeys(_in_words(argument) for argument in arguments))
    if origin in (list, tuple):
        return f"list of {_in_words(arguments[0])}"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping to {_in_words(arguments[1])}"
    if _is_ours(hint):
        return _KEYS_BELOW
    return {str: "text", int: "integer", float: "number", bool: "`true`, `false`"}.get(hint, "class_path and init_args")


def _default(parameter: inspect.Parameter, inner: type | None) -> str:
    default = parameter.default
    if default is parameter.empty:
        return "required"
    if repr(default) == "<factory>" or (inner is not None and default is not None):
        return ""
    if default is None:
        return "`null`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`" if isinstance(default, str | int | float) else ""


def _table(keys: Iterator[Key]) -> str:
    lines = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| `{key.name}` | {key.type} | {key.default} | {key.meaning.replace('|', '&#124;')} |" for key in keys]
    return "\n".join(lines) + "\n"


def _only_in(preference: type, owner: type, prefix: str) -> Iterator[Key]:
    known = {key.name for key in keys_of(owner, prefix)}
    return (key for key in keys_of(preference, prefix) if key.name not in known)


def page() -> str:
    """Return the page, as Markdown."""
    parts = [
        _INTRODUCTION,
        f"## model\n\n{_table(keys_of(TrainingSpec, 'model'))}",
        f"## data\n\n{_table(keys_of(DataSpec, 'data'))}",
        "## With `task: dpo`\n\nThe keys above, and:\n\n"
        + _table(
            each
            for preference, owner, prefix in (
                (PreferenceSpec, TrainingSpec, "model"),
                (PairDataSpec, DataSpec, "data"),
            )
            for each in _only_in(preference, owner, prefix)
        ),
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
