"""A file, a folder, a `save_to_disk` folder or a Hub data set → records, each with its location.

Records are read one after the other and never all held in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sft_lightning.data.sources.files import READERS, Rows, read_file, reader_of
from sft_lightning.data.sources.folder import folder_files
from sft_lightning.errors import UserError, one_of, shortened
from sft_lightning.types import Record


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of the blend.

    Raises:
        UserError: If a number is out of range.
    """

    path: str
    """A `.json`, `.jsonl`, `.jsonl.gz`, `.csv`, `.parquet`, `.arrow` or `.txt` file, a folder of them (searched
    recursively, in sorted order; of several types, the commonest is read), a folder that `datasets` saved with
    `save_to_disk`, or the id of a data set on the Hugging Face Hub."""

    format: str | None = None
    """How a record becomes messages: alpaca, firefly, messages, preference, prompt_completion, segments, sharegpt,
    text, deepspeed_chat/<name>, or the dotted path of a function `Record -> list[Message]`. Default: detected from the
    path or from the keys of the first record."""

    columns: dict[str, str] | None = None
    """Keys of the format, each with the key to read it from: `{instruction: question, output: answer}`."""

    weight: float = 1.0
    """How often the source is seen, in the unit of `data.blend.by`. By default passes per epoch: 1 shows each example
    once, 2 twice, 0.5 a different half in each epoch."""

    max_epochs: float = 1.0
    """If `weight` is a share: the most passes over the source in one epoch; the first source to reach it ends the
    epoch."""

    max_examples: int | None = None
    """Read at most this many records."""

    split: str | None = None
    """Split of a Hub data set or a `save_to_disk` folder (default: train), or a slice such as `train[:10%]`. For a
    plain folder: read only the files and subfolders of that name."""

    glob: str | None = None
    """For a folder: read only the files that match, such as `*.json`. Default: all files of the commonest type, without
    hidden files and caches of `datasets`."""

    subset: str | None = None
    """Subset (configuration) of a Hub data set."""

    revision: str | None = None
    """Commit, branch or tag of a Hub data set."""

    sft_only: bool = False
    """Use the whole source, even if `data.data_split` divides the others among training stages."""

    streaming: bool = False
    """Read, tokenize and pack the source during training, for data larger than disk or memory. Requires
    `trainer.max_steps`."""

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise UserError(
                f"data.sources.<name>.weight: must be above 0 (got {self.weight}); raise it, or remove the source"
            )
        if self.max_epochs <= 0:
            raise UserError(f"data.sources.<name>.max_epochs: must be above 0 (got {self.max_epochs})")
        if self.max_examples is not None and self.max_examples < 1:
            raise UserError(f"data.sources.<name>.max_examples: must be at least 1 (got {self.max_examples})")


def read_records(name: str, config: SourceConfig) -> Iterator[Record]:
    """Yield the records of a source, in file order.

    Args:
        name: The source's name in the YAML, for messages.
        config: The source.

    Raises:
        UserError: If a path does not exist, holds no records, or cannot be read; with file and line.
    """
    for location, row in islice(_rows(name, config), config.max_examples):
        if isinstance(row, list) and row and all(isinstance(turn, dict) for turn in row):
            row = {"messages": row}  # a bare list of messages, as llama-recipes writes conversations
        if not isinstance(row, dict):
            raise UserError(
                f"{location}: a record must be a JSON object (got {type(row).__name__}: {shortened(repr(row))})"
            )
        fields = _renamed(name, config.columns, location, row) if config.columns else row
        yield Record(fields=fields, source=name, location=location)


def read_record(name: str, config: SourceConfig, index: int) -> Record:
    """Return the record at an index; the source is read up to it.

    Args:
        name: The source's name in the YAML, for messages.
        config: The source.
        index: From 0.
    """
    return next(islice(read_records(name, config), index, None))


def _rows(name: str, config: SourceConfig) -> Rows:
    path = Path(config.path).expanduser()
    if path.exists() and not is_saved_dataset(path):
        for file in source_files(name, config):
            yield from read_file(file)
        return
    for index, row in enumerate(load_dataset(name, config)):
        yield f"{config.path}, record {index}", row


def source_files(name: str, config: SourceConfig) -> list[Path]:
    """Return the files of a source that is a file or a folder, in reading order.

    Args:
        name: The source's name in the YAML, for messages.
        config: The source.

    Raises:
        UserError: If there is no file, or the file type is unknown.
    """
    path, key = Path(config.path).expanduser(), f"data.sources.{name}"
    _refuse_hub_options(key, config)
    if path.is_file():
        if config.glob is not None:
            raise UserError(f"{key}.glob: {config.glob!r} is only valid for a folder, but {config.path!r} is a file")
        if config.split is not None:
            raise UserError(f"{key}.split: {config.split!r}, but {config.path!r} is a single file, which has no splits")
        if reader_of(path) is None:
            raise one_of(f"{key}.path: {config.path!r}: the file type", path.suffix, READERS)
        return [path]
    return folder_files(path, key=key, split=config.split, glob=config.glob)


def _refuse_hub_options(key: str, config: SourceConfig) -> None:
    if config.subset is not None or config.revision is not None:
        raise UserError(f"{key}: subset and revision are only valid for Hub data sets, but {config.path!r} is local")


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `datasets`' `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def load_dataset(name: str, config: SourceConfig) -> Any:
    """Load a `save_to_disk` folder or a Hub data set.

    Args:
        name: The source's name in the YAML, for messages.
        config: The source.

    Raises:
        UserError: If the data set or its split does not exist, or the Hub cannot be reached.
    """
    path, key = Path(config.path).expanduser(), f"data.sources.{name}"
    if path.exists():
        _refuse_hub_options(key, config)
        return _load_saved(key, path, config.split)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.path) or reader_of(path):
        raise UserError(f"{key}.path: {config.path!r} does not exist (looked in {Path.cwd()})")
    import datasets  # takes a second, which plain files do not need

    try:
        return datasets.load_dataset(
            config.path,
            config.subset,
            split=config.split or "train",
            revision=config.revision,
            streaming=config.streaming,
        )
    except (OSError, ValueError) as error:  # the types of every error of `datasets` about a wrong request
        raise UserError(
            f"{key}.path: {config.path!r} is not a local file or folder (looked in {Path.cwd()}), and loading it from "
            f"the Hugging Face Hub failed: {shortened(str(error).partition(chr(10))[0], 300)}"
        ) from error


def _load_saved(key: str, path: Path, split: str | None) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}.path: cannot load {str(path)!r} as a save_to_disk folder: {error}") from error
    if isinstance(loaded, datasets.Dataset):
        if split is not None:
            raise UserError(f"{key}.split: {split!r}, but {str(path)!r} has no splits")
        return loaded
    wanted = split or "train"
    if wanted.partition("[")[0] not in loaded:
        raise one_of(f"{key}.split", wanted, [str(each) for each in loaded])
    try:
        spec = datasets.ReadInstruction.from_spec(wanted)
        parts = spec.to_absolute({name: len(part) for name, part in loaded.items()})
    except ValueError as error:
        raise UserError(f"{key}.split: {wanted!r}: {error}") from error
    return datasets.concatenate_datasets([loaded[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _renamed(name: str, columns: Mapping[str, str], location: str, row: Mapping[str, Any]) -> dict[str, Any]:
    for ours, theirs in columns.items():
        if theirs not in row:
            raise UserError(
                f"{location}: data.sources.{name}.columns reads {ours!r} from {theirs!r}, but the record has no such "
                f"key; its keys are: {', '.join(sorted(row))}"
            )
    moved = set(columns.values())
    return {key: value for key, value in row.items() if key not in moved} | {
        ours: row[theirs] for ours, theirs in columns.items()
    }
