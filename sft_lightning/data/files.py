"""Files of every type → rows, each with the place where a person finds it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_lightning.errors import UserError, one_of

Rows = Iterator[tuple[str, Any]]
"""(location, row) of every row of a file."""


def read_file(path: Path) -> Rows:
    """Yield the location and the row of every record of a file.

    Raises:
        UserError: If the file holds none, or is not what its name says; with file and line.
    """
    reader = reader_of(path)
    if reader is None:
        raise one_of(f"{path}: the file type", path.suffix, READERS)
    empty = True
    for location_and_row in reader(path):
        empty = False
        yield location_and_row
    if empty:
        raise UserError(f"{path}: the file holds no records; remove it or point data.sources at another")


def _read_json(path: Path) -> Rows:
    text = _text(path)
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if _is_json_lines(text):
            yield from _lines(path, text)
            return
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}") from error
    for index, row in enumerate(document if isinstance(document, list) else [document]):
        yield f"{path}, record {index}", row


def _read_json_lines(path: Path) -> Rows:
    yield from _lines(path, _text(path))


def _lines(path: Path, text: str) -> Rows:
    # Split at "\n" alone: JSON strings may hold U+2028 and other characters that `splitlines` takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}, column {error.colno}: broken JSON: {error.msg}") from error


def _read_csv(path: Path) -> Rows:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    for row in reader:
        if None in row or None in row.values():
            found = len([cell for cell in row.values() if cell is not None])
            raise UserError(
                f"{path}, line {reader.line_num}: the row does not have the {len(reader.fieldnames or [])} cells of "
                f"the heading (found {found}{' and more' if None in row else ''}); quote cells with commas or line ends"
            )
        yield f"{path}, line {reader.line_num}", row


def _read_text(path: Path) -> Rows:
    """A plain text file is one document."""
    yield str(path), {"text": _text(path)}


def _read_parquet(path: Path) -> Rows:
    yield from _read_table(path, lambda: pq.read_table(path))


def _read_arrow(path: Path) -> Rows:
    """Arrow's file format, or its stream format, which `datasets` writes."""

    def read() -> pa.Table:
        with pa.memory_map(str(path)) as source:
            try:
                return pa.ipc.open_file(source).read_all()
            except pa.ArrowInvalid:
                source.seek(0)
                return pa.ipc.open_stream(source).read_all()

    yield from _read_table(path, read)


def _read_table(path: Path, read: Callable[[], pa.Table]) -> Rows:
    try:
        table = read()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a {path.suffix} file that Arrow can read: {error}") from error
    for index, row in enumerate(table.to_pylist()):
        yield f"{path}, record {index}", row


def _text(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        hint = "it is a git-LFS pointer; run `git lfs pull`" if _is_lfs_pointer(path) else str(error)
        raise UserError(f"{path}: not a gzip file that can be read: {hint}") from error
    if not text.strip():
        raise UserError(f"{path}: the file is empty; remove it or point data.sources at another")
    if text.startswith(_LFS_POINTER):
        raise UserError(f"{path}: the file is a git-LFS pointer, not the data; run `git lfs pull`")
    return text


_LFS_POINTER = "version https://git-lfs.github.com/spec/"


def _is_lfs_pointer(path: Path) -> bool:
    return path.read_bytes().startswith(_LFS_POINTER.encode())


READERS: Mapping[str, Callable[[Path], Rows]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}


def reader_of(path: Path) -> Callable[[Path], Rows] | None:
    """Return what reads a file of this name, if anything does."""
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    return READERS.get(suffix)


def _is_json_lines(text: str) -> bool:
    """Whether a `.json` file holds one object a line, as many published data sets do."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return isinstance(json.loads(first), dict) and bool(rest.strip())
    except json.JSONDecodeError:
        return False
