"""A parser whose errors are one message: the key, the value, and the way out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from sft_lightning.compat.jsonargparse import known_keys, missing_package, rejected_key, short_reason, unknown_key
from sft_lightning.errors import UserError, did_you_mean


class CommandParser(LightningArgumentParser):
    """A parser whose errors are one message with the nearest valid key."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise the message as a UserError."""
        raise UserError(clear_message(message, known_keys(self) or ())) from ex


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
