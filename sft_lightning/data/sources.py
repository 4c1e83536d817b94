"""A file or a folder → Records, each knowing where it stands so that an error can point at it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sft_lightning.data.files import READERS, read_file, reader_of
from sft_lightning.errors import UserError, one_of
from sft_lightning.types import Record


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of the blend.

    Raises:
        UserError: If `weight` is not positive or `max_examples` is below 1.
    """

    path: str
    """A `.json`, `.jsonl`, `.jsonl.gz`, `.csv`, `.parquet`, `.arrow` or `.txt` file, or a folder of them (searched
    recursively, in sorted order)."""

    format: str | None = None
    """How a record becomes messages: alpaca, firefly, messages, prompt_completion, segments, sharegpt or text.
    Default: as the first record's keys tell."""

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
        for location, row in read_file(file):
            if not isinstance(row, dict):
                raise UserError(f"{location}: a record must be a JSON object, not {type(row).__name__}: {_short(row)}")
            records.append(Record(fields=row, source=name, location=location))
            if config.max_examples is not None and len(records) == config.max_examples:
                return records
    return records


def _files(name: str, path: Path) -> list[Path]:
    if path.is_file():
        if reader_of(path) is None:
            raise one_of(f"data.sources.{name}.path: {str(path)!r}: the file type", path.suffix, READERS)
        return [path]
    if not path.is_dir():
        raise UserError(f"data.sources.{name}.path: {str(path)!r} does not exist (looked in {Path.cwd()})")
    files = sorted(file for file in path.rglob("*") if file.is_file() and reader_of(file))
    if not files:
        raise UserError(f"data.sources.{name}.path: the folder {str(path)!r} holds no {', '.join(READERS)} file")
    return files


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
