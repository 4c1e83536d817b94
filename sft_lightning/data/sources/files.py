"""Files of every supported type → rows, each with its location."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

from sft_lightning.errors import UserError, one_of

Rows = Iterator[tuple[str, Any]]
"""Location and value of every row of a file."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ROWS_AT_ONCE = 1024


def read_file(path: Path) -> Rows:
    """Yield the location and the value of every row of a file.

    Raises:
        UserError: If the file type is unknown, if the file holds no row, or if it is broken; with file and line.
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
        raise UserError(f"{path}: the file holds no records; remove it, or name another in data.sources")


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
    csv.field_size_limit(sys.maxsize)  # the default refuses cells above 128 KiB, such as a long document
    with _open(path) as file:
        reader = csv.DictReader(file)
        for row in _csv_rows(path, reader):
            if None in row or None in row.values():
                extra = len(row.get(None) or ())  # the key of cells beyond the header
                found = len([cell for key, cell in row.items() if key is not None and cell is not None]) + extra
                raise UserError(
                    f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or [])} columns as in the "
                    f"header, found {found}; put quotes around cells that contain commas or line breaks"
                )
            yield f"{path}, line {reader.line_num}", row


def _csv_rows(path: Path, reader: csv.DictReader[str]) -> Iterator[dict[Any, Any]]:
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num + 1}: broken CSV: {error}") from error


def _read_text(path: Path) -> Rows:
    """A plain text file is one document."""
    yield str(path), {"text": _text(path)}


def _read_parquet(path: Path) -> Rows:
    import pyarrow.parquet as pq

    yield from _rows_of(path, lambda: pq.ParquetFile(path).iter_batches(batch_size=_ROWS_AT_ONCE))


def _read_arrow(path: Path) -> Rows:
    """Read Arrow's file format, or its stream format, which `datasets` writes."""
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        with pa.memory_map(str(path)) as source:
            try:
                reader = pa.ipc.open_file(source)
            except pa.ArrowInvalid:
                source.seek(0)
                yield from pa.ipc.open_stream(source)
                return
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))

    yield from _rows_of(path, batches)


def _rows_of(path: Path, batches: Callable[[], Iterator[Any]]) -> Rows:
    """Yield the rows of Arrow record batches; pyarrow is imported here, because most files do without it."""
    from pyarrow import ArrowException

    index = 0
    try:
        for batch in batches():
            for row in batch.to_pylist():
                yield f"{path}, record {index}", row
                index += 1
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: Arrow cannot read this {path.suffix} file: {error}") from error


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(f"{path}: the file is a git-LFS pointer, not the data; run `git lfs pull`")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    """Open a text file, compressed if its name ends in `.gz`.

    Lines end at "\\n" only: JSON strings may contain U+2028 and other characters that `splitlines` takes for line ends.

    Raises:
        UserError: If the file is empty, or turns out not to be UTF-8 text or not to be gzip while it is read.
    """
    if not path.stat().st_size:
        raise UserError(f"{path}: the file is empty; remove it, or name another in data.sources")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            yield cast("TextIO", file)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason}, byte {error.object[error.start]:#04x}); convert it to UTF-8"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot decompress the file with gzip: {error}") from error


def _text(path: Path) -> str:
    with _open(path) as file:
        text = file.read()
    if not text.strip():
        raise UserError(f"{path}: the file is empty; remove it, or name another in data.sources")
    return text


READERS: Mapping[str, Callable[[Path], Rows]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}
"""The function that reads each file type, by the ending of the name."""


def file_type(path: Path) -> str | None:
    """Return the ending that says how a file is read, a key of `READERS`; `None` if the file type is unknown."""
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    return suffix if suffix in READERS else None


def reader_of(path: Path) -> Callable[[Path], Rows] | None:
    """Return the function that reads a file of this name; `None` if the file type is unknown."""
    kind = file_type(path)
    return None if kind is None else READERS[kind]


def _is_json_lines(text: str) -> bool:
    """Whether a `.json` file holds one object per line, as many published data sets do."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return isinstance(json.loads(first), dict) and bool(rest.strip())
    except json.JSONDecodeError:
        return False
