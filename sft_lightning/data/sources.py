"""A file or a folder → Records, each knowing where it stands so that an error can point at it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_lightning.errors import UserError, one_of
from sft_lightning.types import Record

SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of the blend.

    Raises:
        UserError: If `weight` is not positive or `max_examples` is below 1.
    """

    path: str
    """A `.json` or `.jsonl` file, or a folder of them (searched recursively, in sorted order)."""

    format: str | None = None
    """How a record becomes messages: alpaca, messages, sharegpt or text. Default: as the first record's keys tell."""

    weight: float = 1.0
    """How often each example is seen per epoch: 1 once, 2 twice, 0.5 a different half of the source in each epoch."""

    max_examples: int | None = None
    """Read at most this many records."""

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise UserError(f"data.sources: weight must be above 0 (got {self.weight}); leave the source out instead")
        if self.max_examples is not None and self.max_examples < 1:
            raise UserError(f"data.sources: max_examples must be at least 1 (got {self.max_examples})")


def read_records(name: str, config: SourceConfig) -> list[Record]:
    """Read all records of a source, in file order.

    Args:
        name: The source's name in the YAML, for messages.
        config: Where to read.

    Raises:
        UserError: If a path does not exist, holds no records, or is not valid JSON; with file and line.
    """
    records: list[Record] = []
    for file in _files(name, Path(config.path).expanduser()):
        for location, row in _read_file(file):
            if not isinstance(row, dict):
                raise UserError(f"{location}: a record must be a JSON object, not {type(row).__name__}: {_short(row)}")
            records.append(Record(fields=row, source=name, location=location))
            if config.max_examples is not None and len(records) == config.max_examples:
                return records
    return records


def _files(name: str, path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise one_of(f"data.sources.{name}.path: {str(path)!r}: the file type", path.suffix, SUFFIXES)
        return [path]
    if not path.is_dir():
        raise UserError(f"data.sources.{name}.path: {str(path)!r} does not exist (looked in {Path.cwd()})")
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"data.sources.{name}.path: the folder {str(path)!r} holds no {' or '.join(SUFFIXES)} file")
    return files


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (location, row) for every row of a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8"
        ) from error
    if not text.strip():
        raise UserError(f"{path}: the file is empty; remove it or point data.sources at another")
    return _read_lines(path, text) if path.suffix == ".jsonl" else _read_document(path, text)


def _read_document(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if _is_json_lines(text):
            yield from _read_lines(path, text)
            return
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}") from error
    rows = document if isinstance(document, list) else [document]
    if not rows:
        raise UserError(f"{path}: the list is empty; remove the file or point data.sources at another")
    for index, row in enumerate(rows):
        yield f"{path}, record {index}", row


def _read_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # Split at "\n" alone: JSON strings may hold U+2028 and other characters that `splitlines` takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}, column {error.colno}: broken JSON: {error.msg}") from error


def _is_json_lines(text: str) -> bool:
    """Whether a `.json` file holds one object a line, as many published data sets do."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return isinstance(json.loads(first), dict) and bool(rest.strip())
    except json.JSONDecodeError:
        return False


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
