"""Token stores: tokenized examples as flat arrays, memory-mapped from a folder.

The folder has one file per array and a manifest with the size and checksum of each. It is written under another name
and renamed when complete, so a build that is killed leaves nothing that looks like a store. The checksums are compared
whenever a store is opened, so a truncated or altered store is not used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from sft_lightning.data.tokens.flat_examples import FlatExamples, starts_of, summarize
from sft_lightning.data.tokens.tokenization import TokenizedBatch
from sft_lightning.types import Longs

MANIFEST = "manifest.json"


class DamagedStoreError(Exception):
    """The files of a store are not those that its manifest lists."""


@dataclass(frozen=True)
class TokenStore(FlatExamples):
    """All examples of a source, the record of each example, and what happened to every record."""

    records: Longs
    """Index of the record of each example, from 0 in reading order, (N,)."""

    marks: npt.NDArray[np.uint32]
    """What happened to each record, one bit for each code of its `RecordLog`, (records,)."""


_TYPES: Mapping[str, type[np.generic]] = {
    "input_ids": np.int32,
    "loss_weights": np.float32,
    "lengths": np.int32,
    "records": np.int32,
    "supervised": np.int32,
    "weights": np.float64,
    "marks": np.uint32,
}
"""The arrays of a store on disk; `starts` is computed from `lengths`."""


class StoreWriter:
    """Writes a store batch by batch, so that it may be larger than memory.

    Args:
        folder: The folder to write, which must not exist.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._files = {name: _HashedFile(folder / _file_of(name)) for name in _TYPES}
        self.num_examples = 0
        self.num_tokens = 0

    def append(self, batch: TokenizedBatch, records: Longs) -> None:
        """Write examples.

        Args:
            batch: The examples.
            records: Index of the record of each example, (N,).
        """
        lengths, supervised, weights = summarize(batch)
        columns: dict[str, npt.NDArray[Any]] = {
            "input_ids": batch.input_ids,
            "loss_weights": batch.loss_weights,
            "lengths": lengths,
            "records": records,
            "supervised": supervised,
            "weights": weights,
        }
        for name, column in columns.items():
            self._files[name].write(np.ascontiguousarray(column, _TYPES[name]))
        self.num_examples += len(batch)
        self.num_tokens += len(batch.input_ids)

    def finish(self, marks: npt.NDArray[np.uint32], facts: Mapping[str, Any]) -> None:
        """Write the marks and the manifest.

        Args:
            marks: What happened to each record, (records,).
            facts: What the store was made of and what happened to the records; `open_store` returns them.
        """
        self._files["marks"].write(marks)
        files = {_file_of(name): file.close() for name, file in self._files.items()}
        content = {**facts, "num_examples": self.num_examples, "num_tokens": self.num_tokens, "files": files}
        text = json.dumps({**content, "checksum": _checksum(content)}, indent=2) + "\n"
        with (self._folder / MANIFEST).open("w") as file:
            file.write(text)

    def abandon(self) -> None:
        """Close the files of a build that failed."""
        for file in self._files.values():
            file.close()


class _HashedFile:
    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._hash = xxhash.xxh3_128()
        self._bytes = 0

    def write(self, array: npt.NDArray[Any]) -> None:
        self._file.write(array.data)
        self._hash.update(array.data)
        self._bytes += array.nbytes

    def close(self) -> dict[str, Any]:
        if not self._file.closed:
            self._file.close()
        return {"bytes": self._bytes, "xxh3_128": self._hash.hexdigest()}


def open_store(folder: Path) -> tuple[TokenStore, dict[str, Any]]:
    """Map a store's arrays into memory, and return its manifest.

    Raises:
        FileNotFoundError: If there is no store.
        DamagedStoreError: If the files are not those that were written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    manifest = _manifest(folder)
    for name, written in manifest["files"].items():
        _verify(folder / name, written)
    arrays = {name: _map(folder / _file_of(name), dtype) for name, dtype in _TYPES.items()}
    for name in ("lengths", "records", "supervised"):
        arrays[name] = arrays[name].astype(np.int64)
    arrays["starts"] = starts_of(arrays["lengths"])
    return TokenStore(**{field.name: arrays[field.name] for field in fields(TokenStore)}), manifest


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        checksum = manifest.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedStoreError(f"{MANIFEST} cannot be read: {error!r}") from error
    if checksum != _checksum(manifest):
        raise DamagedStoreError(f"{MANIFEST} was altered")
    return manifest


def _verify(path: Path, written: Mapping[str, Any]) -> None:
    size = path.stat().st_size if path.is_file() else -1
    if size != written["bytes"]:
        raise DamagedStoreError(f"{path.name} has {max(size, 0):,} bytes instead of {written['bytes']:,}")
    if hash_file(path) != written["xxh3_128"]:
        raise DamagedStoreError(f"{path.name} was altered")


def hash_file(path: Path) -> str:
    """Return the XXH3 hash (128 bits, hexadecimal) of a file's bytes."""
    digest = xxhash.xxh3_128()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path, size: int = 1 << 24) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(size):
            yield block


def _checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _map(path: Path, dtype: type[np.generic]) -> npt.NDArray[Any]:
    if not path.stat().st_size:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r").view(
        np.ndarray
    )  # slicing a memmap takes ten times as long as slicing an array


def _file_of(name: str) -> str:
    return f"{name}.bin"
