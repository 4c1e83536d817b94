"""How jsonargparse words its errors, and which keys its parsers know.

It has no structured errors: what went wrong is read from the text. A text that is worded in another way stays as it is,
which is longer to read and says the same.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft_lightning.compat.names import uses

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_OWNER = re.compile(r'Parser key "(?P<key>[^"]+)":\s*')
_UNKNOWN_KEY = re.compile(
    r"(?:does not accept option|Option) '(?P<quoted>[^']+)'|unrecognized arguments: --(?P<argument>[^\s=]+)"
)
_MISSING_PACKAGE = re.compile(
    r"class_path '(?P<class_path>[\w.]+)':\s+Requirement '(?P<requirement>(?P<package>[\w-]+)[^']*)' not met"
)
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes.*?Errors:\n(?P<errors>.*)\n\s*Given value type: .*?"
    r"Given value: (?P<value>.*)",
    re.S,
)
_ONE_ERROR = re.compile(r"^(?P<indent> *)- (?P<text>.*?)(?=^(?P=indent)- |\Z)", re.S | re.M)
_EXPECTED = re.compile(r"Expected a (?:<class '(?P<type>\w+)'>|typing\.Literal\[(?P<choices>[^\]]*)\])\s*")
_CHOICES = re.compile(r"Expected a typing\.Literal\[(?P<choices>[^\]]*)\]\. Got value: (?P<value>.*)")
_TYPE = re.compile(r"Expected a <class '(?P<type>\w+)'>\. Got value: (?P<value>.*)")
_WRONG_VALUE = re.compile("Parser key|Does not validate")
_NOT_A_PATH = re.compile(r"\s*- Expected a path but .*? either not accessible or invalid\s*- ", re.S)
"""Any value might be the path of a file with it, so this precedes what is wrong with it."""
_NO_VALUE = re.compile(r"argument (?:-\w/)?(?P<option>--[^\s:]+): expected (?:one|at least one) argument")
_REQUIRED = re.compile(r"the following arguments are required: (?P<keys>[\w., ]+)")
_STRAY = re.compile(r"unrecognized arguments: (?P<words>.+)")

_FEATURE = "short messages for errors on the command line"
_SINCE = "4.44"
_INSTEAD = "structured errors, once jsonargparse has them; unknown wording is shown as it is"


@dataclass(frozen=True)
class MissingPackage:
    """A class that is asked for, and whose package is not installed."""

    class_path: str
    """The class."""

    requirement: str
    """What pip would install, such as `deepspeed>=0.18`."""

    package: str
    """Its name alone."""


@uses(feature=_FEATURE, since=_SINCE, replacement=_INSTEAD)
def rejected_key(message: str) -> str | None:
    """Return the dotted key whose value a message rejects; of nested parsers, the outermost."""
    found = _OWNER.search(message)
    return found["key"] if found else None


@uses(feature=_FEATURE, since=_SINCE, replacement=_INSTEAD)
def unknown_key(message: str) -> str | None:
    """Return the key that a parser does not know, as the user wrote it; `None` for another error."""
    found = _UNKNOWN_KEY.search(message)
    return (found["quoted"] or found["argument"]) if found else None


@uses(feature=_FEATURE, since=_SINCE, replacement=_INSTEAD)
def missing_package(message: str) -> MissingPackage | None:
    """Return the package that a class needs; `None` for another error."""
    found = _MISSING_PACKAGE.search(message)
    return MissingPackage(**found.groupdict()) if found else None


@uses(feature=_FEATURE, since=_SINCE, replacement=_INSTEAD)
def option_without_value(message: str) -> str | None:
    """Return the option that lacks its value, such as `--config`; `None` for another error."""
    found = _NO_VALUE.search(message)
    return found["option"] if found else None


@uses(feature=_FEATURE, since=_SINCE, replacement=_INSTEAD)
def required_keys(message: str) -> list[str]:
    """Return the keys that are required and missing; none for another error."""
    found = _REQUIRED.search(message)
    return found["keys"].split(", ") if found else []


@uses(feature=_FEATURE, since=_SINCE, replacement=_INSTEAD)
def stray_words(message: str) -> str | None:
    """Return the words on the command line that belong to no option; `None` for another error."""
    found = _STRAY.search(message)
    return found["words"] if found else None


@uses(feature=_FEATURE, since=_SINCE, replacement=_INSTEAD)
def short_reason(message: str) -> str:
    """Return a message as one line: each key, then what is wrong with its value.

    A value that fits none of several types has a reason for each; one that is more than the name of a type wins.
    """
    text = _UNION.sub(_reason_of_union, _NOT_A_PATH.sub(" ", message))
    owner = _OWNER.search(message)
    if owner and text.replace(owner[0], "").lstrip().startswith(owner["key"]):
        text = text.replace(owner[0], "")  # a message of ours, which names the key already
    text = _OWNER.sub(lambda found: f"{found['key']}: ", text)
    text = _CHOICES.sub(lambda found: f"must be one of {found['choices']} (got {found['value']!r})", text)
    text = _TYPE.sub(lambda found: f"must be of type {found['type']} (got {found['value']!r})", text)
    return re.sub(r"\s*\n\s*", " ", text.strip())


def _reason_of_union(union: re.Match[str]) -> str:
    errors = [each["text"] for each in _ONE_ERROR.finditer(union["errors"])]
    types = [_EXPECTED.fullmatch(error) for error in errors]
    telling = next((error for error, kind in zip(errors, types, strict=True) if kind is None), None)
    if telling is not None:
        return _UNION.sub(_reason_of_union, telling)
    names = [kind["choices"] or kind["type"] for kind in types if kind is not None and kind["type"] != "NoneType"]
    return f"must be of type {' or '.join(names)} (got {union['value']!r})"


@uses(feature=_FEATURE, since=_SINCE, replacement=_INSTEAD)
def is_about_a_value(error: Exception) -> bool:
    """Whether an error of `parser.instantiate` is about a value that the user wrote, not about code that failed."""
    return _WRONG_VALUE.search(str(error)) is not None


@uses(
    attributes=("_actions",),
    feature="the nearest valid key in errors on the command line",
    since="4.27",
    replacement="`parser.get_defaults().keys()`, which lacks the keys inside options that are null by default",
    optional=True,
)
def known_keys(parser: ArgumentParser) -> list[str] | None:
    """Return the dotted keys that a parser knows, those of its subcommands and of nested dataclasses included.

    `None` if the parser does not tell.
    """
    keys: list[str] = []
    for action in parser._actions:
        subparsers = getattr(action, "_name_parser_map", None)
        if subparsers:
            for subparser in subparsers.values():
                keys += known_keys(subparser) or []
        elif action.dest and action.dest != "==SUPPRESS==":
            keys.append(action.dest)
            keys += [f"{action.dest}.{name}" for name in _fields_in(getattr(action, "_typehint", None))]
    return keys


def _fields_in(typehint: Any) -> Iterator[str]:
    """Yield the field names of the dataclasses in a type such as `AdapterConfig | None`."""
    if dataclasses.is_dataclass(typehint):
        yield from (field.name for field in dataclasses.fields(typehint))
    for part in getattr(typehint, "__args__", ()):
        yield from _fields_in(part)
