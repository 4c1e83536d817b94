"""`~` and environment variables in the values of keys that name a file or a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

from jsonargparse import Namespace

from sft_lightning.errors import UserError

_PATH_KEYS = frozenset({
    *("path", "model_name_or_path", "tokenizer_name_or_path", "template", "store_dir", "nvme_path"),
    *("ckpt_path", "default_root_dir", "save_dir", "dirpath"),
    *("adapter", "output_dir", "baseline", "finetuned", "model", "prompts", "html", "markdown", "jsonl", "report"),
})  # fmt: skip
"""Last parts of keys whose text is a path, or may be one."""

_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def expand_paths(config: Namespace) -> None:
    """Replace `~`, `$NAME` and `${NAME}` in paths, whatever they are nested in.

    Args:
        config: A parsed configuration, changed in place.

    Raises:
        UserError: If a variable is not set.
    """
    _expand_values(config, "")


def _expand_values(values: Any, where: str) -> None:
    for name, value in list(_items(values)):
        key = f"{where}.{name}".lstrip(".")
        if name in _PATH_KEYS and isinstance(value, str):
            values[name] = _expanded(key, value)
        elif name in _PATH_KEYS and isinstance(value, list):
            values[name] = [_expanded(key, each) if isinstance(each, str) else each for each in value]
        else:
            _expand_values(value, key)


def _items(values: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(values, Namespace):
        return vars(values).items()
    if isinstance(values, dict):
        return values.items()
    return enumerate(values) if isinstance(values, list) else ()


def _expanded(key: str, value: str) -> str:
    text = os.path.expandvars(value)
    unset = _VARIABLE.search(text)
    if unset:
        raise UserError(f"{key}: the environment variable {unset[1].strip('{}')} of {value!r} is not set")
    return os.path.expanduser(text)  # noqa: PTH111 (Path would change the rest of it, too)
