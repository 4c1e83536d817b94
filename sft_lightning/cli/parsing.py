"""A parser whose errors are one message: the key, the value, and the way out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from sft_lightning.cli.arguments import shows_help
from sft_lightning.compat.jsonargparse import known_keys, missing_package, rejected_key, short_reason, unknown_key
from sft_lightning.errors import UserError, did_you_mean


class CommandParser(ArgumentParser):
    """A parser whose errors are one message with the nearest valid key."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise the message as a UserError."""
        raise UserError(clear_message(message, known_keys(self) or ())) from ex


def command_parser(command: str, description: str | None, args: Sequence[str]) -> CommandParser:
    """Return the parser of a command without a configuration, still without options.

    Args:
        command: Its name.
        description: What it does.
        args: What follows it on the command line; if they ask for help, the docstrings of options are read.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=shows_help(args))
    return CommandParser(prog=f"python -m sft_lightning {command}", description=description)


_SAID_BEFORE = re.compile(r"(?P<key>[\w.]+): no such key\.(?P<near>( Did you mean '[^']+'\?)?)")
"""A message of ours, by a nested parser."""

_EXTRAS = ("wandb", "deepspeed")


def clear_message(message: str, keys: Sequence[str]) -> str:
    """Shorten what jsonargparse says to the key, the value and the way out.

    Args:
        message: As jsonargparse composed it.
        keys: The valid keys, dotted; the nearest to an unknown one is named.
    """
    rejected = rejected_key(message)
    prefix = f"{rejected}." if rejected else ""
    before = _SAID_BEFORE.search(message)
    if before:
        key = before["key"] if before["key"].startswith(prefix) else prefix + before["key"]
        return f"{key}: no such key.{before['near']}"
    missing = missing_package(message)
    if missing:
        extra = f"sft-lightning[{missing.package}]" if missing.package in _EXTRAS else missing.requirement
        needed = f"needs {missing.requirement}, which is not installed"
        return f"{missing.class_path}: {needed}; run pip install '{extra}'"
    unknown = unknown_key(message)
    if unknown:
        endings = sorted({known.rsplit(".", 1)[-1] for known in keys})
        near = did_you_mean(unknown, keys) or did_you_mean(unknown.rsplit(".", 1)[-1], endings)
        return f"{unknown if unknown.startswith(prefix) else prefix + unknown}: no such key.{near}"
    return short_reason(message)
