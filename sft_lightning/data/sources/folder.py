"""The data files of a folder: of one type, without what `datasets` and other tools keep beside them."""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sft_lightning.data.sources.files import READERS, file_type
from sft_lightning.errors import UserError, few

logger = logging.getLogger(__name__)

_JSON = (".json", ".jsonl", ".jsonl.gz")
_CACHE_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")
"""Files that `datasets` writes into its folders; the `.arrow` files beside them are its copies of the data."""


def folder_files(folder: Path, *, key: str, split: str | None = None, glob: str | None = None) -> list[Path]:
    """Return the data files of a folder and its subfolders, sorted.

    Hidden files and folders, and what `datasets` cached, are no data. Of several types, only the commonest is read,
    which a warning says: a folder often has the same data in two types.

    Args:
        folder: The folder.
        key: The source's key in the YAML, for messages.
        split: Only files and subfolders of this name.
        glob: Only files that match this pattern, such as `*.json` or `train/**/*.jsonl`; of all types then.

    Raises:
        UserError: If no file is left.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file() and file_type(path))
    data = [path for path in found if not _is_hidden(path.relative_to(folder)) and not _is_cache(path)]
    if not data:
        raise UserError(f"{key}.path: the folder {str(folder)!r} contains no file of type {', '.join(READERS)}")
    if glob is not None:
        data = _matching(folder, data, glob, key)
    if split is not None:
        data = _of_split(folder, data, split, key)
    return data if glob is not None else _of_one_type(folder, data, key)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_cache(path: Path) -> bool:
    has_cache = any((path.parent / name).is_file() for name in _CACHE_FILES)
    return path.name in _CACHE_FILES or (has_cache and path.suffix == ".arrow")


def _matching(folder: Path, files: Sequence[Path], glob: str, key: str) -> list[Path]:
    matching = set(folder.rglob(glob))
    if not matching.intersection(files):
        raise UserError(
            f"{key}.glob: {glob!r} matches no data file in {str(folder)!r}, which has {_names(folder, files)}"
        )
    return [path for path in files if path in matching]


def _of_split(folder: Path, files: Sequence[Path], split: str, key: str) -> list[Path]:
    named = [path for path in files if _is_of_split(path.relative_to(folder), split)]
    if not named:
        raise UserError(
            f"{key}.split: {str(folder)!r} contains no file or subfolder named {split!r}; it contains: "
            f"{_names(folder, files)}"
        )
    return named


def _is_of_split(path: Path, split: str) -> bool:
    """Whether a path belongs to a split: `train.jsonl`, `train-00000-of-00002.parquet`, `train/part.json`."""
    return any(re.match(rf"{re.escape(split)}(\W|$)", part) for part in path.parts)


def _of_one_type(folder: Path, files: Sequence[Path], key: str) -> list[Path]:
    numbers = Counter(map(_kind, files))
    commonest, _ = max(numbers.items(), key=lambda item: (item[1], item[0] == "JSON"))
    if len(numbers) > 1:
        others = ", ".join(f"{number} {kind}" for kind, number in sorted(numbers.items()) if kind != commonest)
        _warn_once(
            f"{key}: reads the {numbers[commonest]} {commonest} files of {str(folder)!r} and leaves out the others "
            f"({others}); set {key}.glob to choose, such as '*.json'"
        )
    return [path for path in files if _kind(path) == commonest]


def _kind(path: Path) -> str:
    """Return the type of a data file; all files of JSON are of one type."""
    ending = file_type(path) or ""
    return "JSON" if ending in _JSON else ending


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _names(folder: Path, files: Sequence[Path]) -> str:
    return few([str(path.relative_to(folder)) for path in files], 8)
