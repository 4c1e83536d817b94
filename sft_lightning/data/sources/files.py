"""Files of every type → rows, each with the place where a person finds it."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

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
    _refuse_pointer(path)
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
            yield from _lines(path, text.split("\n"))
            return
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}") from error
    for index, row in enumerate(document if isinstance(document, list) else [document]):
        yield f"{path}, record {index}", row


def _read_json_lines(path: Path) -> Rows:
    with _open(path) as file:
        yield from _lines(path, file)


def _lines(path: Path, lines: Iterable[str]) -> Rows:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}, column {error.colno}: broken JSON: {error.msg}") from error
        yield f"{path}, line {number}", row


def _read_csv(path: Path) -> Rows:
    with _open(path) as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row or None in row.values():
                found = len([cell for cell in row.values() if cell is not None])
                raise UserError(
                    f"{path}, line {reader.line_num}: the row has not the {len(reader.fieldnames or [])} cells of "
                    f"the heading (found {found}{' and more' if None in row else ''}); "
                    "quote cells with commas or line ends"
                )
            yield f"{path}, line {reader.line_num}", row


def _read_text(path: Path) -> Rows:
    """A plain text file is one document."""
    yield str(path), {"text": _text(path)}


def _read_parquet(path: Path) -> Rows:
    yield from _rows_of(path, lambda: pq.ParquetFile(path).iter_batches(batch_size=_ROWS_AT_ONCE))


def _read_arrow(path: Path) -> Rows:
    """Arrow's file format, or its stream format, which `datasets` writes."""

    def batches() -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as source:
            try:
                reader = pa.ipc.open_file(source)
            except pa.ArrowInvalid:
                source.seek(0)
                yield from pa.ipc.open_stream(source)
                return
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))

    yield from _rows_of(path, batches)


_ROWS_AT_ONCE = 1024


def _rows_of(path: Path, batches: Callable[[], Iterator[pa.RecordBatch]]) -> Rows:
    index = 0
    try:
        for batch in batches():
            for row in batch.to_pylist():
                yield f"{path}, record {index}", row
                index += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a {path.suffix} file that Arrow can read: {error}") from error


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(f"{path}: the file is a git-LFS pointer, not the data; run `git lfs pull`")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    """Open a text file, perhaps compressed, for reading from its first character on.

    Lines end at "\\n" alone: JSON strings may hold U+2028 and other characters that `splitlines` takes for line ends.

    Raises:
        UserError: If it is empty, or not UTF-8 text; while it is read, too.
    """
    if not path.stat().st_size:
        raise UserError(f"{path}: the file is empty; remove it or point data.sources at another")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            yield cast("TextIO", file)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason}, byte {error.object[error.start]:#04x}); convert it to UTF-8"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a gzip file that can be read: {error}") from error


def _text(path: Path) -> str:
    with _open(path) as file:
        text = file.read()
    if not text.strip():
        raise UserError(f"{path}: the file is empty; remove it or point data.sources at another")
    return text


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


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
