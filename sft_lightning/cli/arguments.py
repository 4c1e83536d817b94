"""What the command line and its config files set, read before they are parsed.

The parser depends on it: `task` decides which keys exist, and the default optimizer is left out when another is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml


def value_of(args: Sequence[str], key: str) -> Any:
    """Return the last value that options and config files set a key to, or `None`; the parser reports errors in them.

    Args:
        args: What follows the command on the command line.
        key: A dotted key, such as `model.optimizer`.
    """
    value: Any = None
    for arg, following in zip_longest(args, args[1:], fillvalue=""):
        option, has_value, text = arg.partition("=")
        text = text if has_value else following
        if option == f"--{key}":
            value = text
        elif option in ("--config", "-c"):
            in_file = _value_in_file(Path(text), key)
            value = value if in_file is None else in_file
    return value


def _value_in_file(config: Path, key: str) -> Any:
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def shows_help(args: Sequence[str]) -> bool:
    """Whether the docstrings of keys will be printed."""
    return any(arg == "-h" or arg.startswith(("--help", "--print_config=comments")) for arg in args)


def names_another_optimizer(args: Sequence[str]) -> bool:
    """Whether an optimizer other than the default is named, which must not inherit the default's arguments."""
    named = [value_of(args, f"model.optimizer{suffix}") for suffix in ("", ".class_path")]
    classes = [value["class_path"] if isinstance(value, dict) and "class_path" in value else value for value in named]
    return any(isinstance(each, str) and not each.endswith("torch.optim.AdamW") for each in classes)


def names_classes(args: Sequence[str]) -> bool:
    """Whether callbacks are given, or a strategy by its class rather than by a short name such as `fsdp2`."""
    options = ("--trainer.callbacks", "--trainer.strategy.")
    return (
        any(arg.startswith(options) for arg in args)
        or value_of(args, "trainer.callbacks") is not None
        or isinstance(value_of(args, "trainer.strategy"), dict)
    )
