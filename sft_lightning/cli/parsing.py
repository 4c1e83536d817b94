"""A parser whose errors are one message: the key, the value, and the way out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from sft_lightning.errors import UserError, did_you_mean


class CommandParser(LightningArgumentParser):
    """A parser whose errors are one message with the nearest valid key."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise the message as a UserError."""
        raise UserError(clear_message(message, known_keys(self))) from ex


_UNKNOWN_KEY = re.compile(
    r"(?:does not accept option|Option) '(?P<quoted>[^']+)'|unrecognized arguments: --(?P<argument>[^\s=]+)"
)
_SAID_BEFORE = re.compile(r"(?P<key>[\w.]+): no such key\.(?P<near>( Did you mean '[^']+'\?)?)")
_OWNER = re.compile(r'Parser key "(?P<key>[^"]+)":\s*')
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes.*?Errors:\s*- (?P<first>.*?)\s+- Expected a .*", re.S
)
_CHOICES = re.compile(r"Expected a typing\.Literal\[(?P<choices>[^\]]*)\]\. Got value: (?P<value>.*)")
_TYPE = re.compile(r"Expected a <class '(?P<type>\w+)'>\. Got value: (?P<value>.*)")
_MISSING_PACKAGE = re.compile(
    r"class_path '(?P<path>[\w.]+)':\s+Requirement '(?P<needed>(?P<name>[\w-]+)[^']*)' not met"
)
_EXTRAS = ("wandb", "deepspeed")


def clear_message(message: str, keys: Sequence[str]) -> str:
    """Shorten what jsonargparse says to the key, the value and the way out.

    Args:
        message: As jsonargparse composed it.
        keys: The valid keys, dotted; the nearest to an unknown one is named.
    """
    owner = _OWNER.search(message)
    prefix = f"{owner['key']}." if owner else ""
    before = _SAID_BEFORE.search(message)
    if before:
        key = before["key"] if before["key"].startswith(prefix) else prefix + before["key"]
        return f"{key}: no such key.{before['near']}"
    missing = _MISSING_PACKAGE.search(message)
    if missing:
        extra = f"sft-lightning[{missing['name']}]" if missing["name"] in _EXTRAS else missing["needed"]
        return f"{missing['path']}: needs {missing['needed']}, which is not installed; run pip install '{extra}'"
    unknown = _UNKNOWN_KEY.search(message)
    if unknown:
        key = unknown["quoted"] or unknown["argument"]
        endings = sorted({known.rsplit(".", 1)[-1] for known in keys})
        near = did_you_mean(key, keys) or did_you_mean(key.rsplit(".", 1)[-1], endings)
        return f"{key if key.startswith(prefix) else prefix + key}: no such key.{near}"
    text = _UNION.sub(lambda union: union["first"], message)
    if owner and text.replace(owner[0], "").lstrip().startswith(owner["key"]):
        text = text.replace(owner[0], "")  # our own message already names the key
    text = _OWNER.sub(lambda found: f"{found['key']}: ", text)
    text = _CHOICES.sub(lambda found: f"must be one of {found['choices']} (got {found['value']!r})", text)
    text = _TYPE.sub(lambda found: f"must be of type {found['type']} (got {found['value']!r})", text)
    return re.sub(r"\s*\n\s*", " ", text.strip())


def known_keys(parser: ArgumentParser) -> list[str]:
    """Return the dotted keys that a parser knows, those of its subcommands and of nested dataclasses included."""
    keys: list[str] = []
    for action in parser._actions:
        choices = getattr(action, "_name_parser_map", None)
        if choices:
            for subparser in choices.values():
                keys += known_keys(subparser)
        elif action.dest and action.dest != "==SUPPRESS==":
            keys.append(action.dest)
            keys += [f"{action.dest}.{name}" for name in _fields_in(getattr(action, "_typehint", None))]
    return keys


def _fields_in(typehint: Any) -> list[str]:
    """Return the field names of the dataclasses in a type such as `AdapterConfig | None`."""
    names = [field.name for field in dataclasses.fields(typehint)] if dataclasses.is_dataclass(typehint) else []
    for part in getattr(typehint, "__args__", ()):
        names += _fields_in(part)
    return names
