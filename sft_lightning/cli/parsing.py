"""Parsers whose errors are one line: the key, the value, and what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from sft_lightning.cli.arguments import asks_for_help
from sft_lightning.cli.paths import expand_paths
from sft_lightning.compat.jsonargparse import (
    known_keys,
    missing_package,
    option_without_value,
    rejected_key,
    required_keys,
    short_reason,
    stray_words,
    unknown_key,
)
from sft_lightning.errors import UserError, did_you_mean


class CommandParser(ArgumentParser):
    """A parser whose errors are a `UserError` of one line, with the nearest valid key; it expands `~` in paths."""

    def parse_args(self, *args: Any, **options: Any) -> Any:
        """Parse as jsonargparse does, and expand `~` and environment variables in paths.

        Args:
            args: As jsonargparse's.
            options: As jsonargparse's.

        Raises:
            UserError: If an argument is wrong, or a variable in a path is not set.
        """
        config = super().parse_args(*args, **options)
        expand_paths(config)
        return config

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise the message as a UserError.

        Args:
            message: jsonargparse's message.
            ex: Its cause.
        """
        raise UserError(clear_message(message, known_keys(self) or ())) from ex


def command_parser(command: str, description: str | None, args: Sequence[str]) -> CommandParser:
    """Return the parser of a command without a configuration, still without options.

    Args:
        command: Its name.
        description: What it does.
        args: What follows it on the command line; if they ask for help, the docstrings of options are read.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=asks_for_help(args))
    return CommandParser(prog=f"python -m sft_lightning {command}", description=description)


_SAID_BEFORE = re.compile(r"(?P<key>[\w.]+): no such key\.(?P<near>( Did you mean '[^']+'\?)?)")
"""A message of ours, from a nested parser."""

_EXTRAS = ("wandb", "deepspeed")


def clear_message(message: str, keys: Sequence[str]) -> str:
    """Return jsonargparse's error as one line: the key, the value, and what to do.

    Args:
        message: jsonargparse's message.
        keys: The valid keys, dotted; the one nearest to an unknown key is named.
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
    option = option_without_value(message)
    if option:
        return f"{option}: requires a value"
    required = required_keys(message)
    if required:
        return f"{', '.join(f'--{key}' for key in required)}: required; --help describes the options"
    stray = stray_words(message)
    if stray:
        return f"{stray}: not an option; options start with --, and a configuration file follows --config"
    return short_reason(message)
