"""Weight files of a Hugging Face folder, read and written shard by shard: one file's tensors in memory at most."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sft_lightning.errors import UserError

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: str) -> int:
    """Return the bytes of a size such as `5GB`, `500MB` or `2GiB`.

    Raises:
        UserError: If it is none, or not above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    if match is None or match[2].upper() not in _UNITS or not float(match[1]):
        raise UserError(f"--max_shard_size: {size!r} is no size; write it as 5GB or 500MB")
    return max(int(float(match[1]) * _UNITS[match[2].upper()]), 1)


def weight_files(folder: Path) -> list[Path]:
    """Return the files with a model's weights: safetensors before `.bin`, a single file before an index.

    Raises:
        UserError: If there are none, or one that the index names is missing.
    """
    for single, index in zip(_SINGLE, _INDEXES, strict=True):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            files = [folder / name for name in sorted(set(_weight_map(folder / index).values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise UserError(f"{folder / index}: names {missing[0]}, which is not there; download the base again")
            return files
    raise UserError(f"{folder}: holds no weights: none of {', '.join(_SINGLE + _INDEXES)} is there")


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of every tensor."""
    weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return weight_map


def tensor_names(folder: Path) -> set[str]:
    """Return the names of all tensors in a folder's weight files; no tensor is read."""
    return {name for file in weight_files(folder) for name in _names_in(file)}


def _names_in(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as reader:
            return list(reader.keys())
    return list(_load_bin(file))


def read_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a weight file's tensors one by one; each is read when it is asked for."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (no mapping)
                yield name, reader.get_tensor(name)
        return
    state = _load_bin(file)
    for name in list(state):
        yield name, state.pop(name)


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    try:
        state: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        state = torch.load(file, map_location="cpu", weights_only=True)  # the format before torch 1.6 is no zip file
    return state


@dataclass(frozen=True)
class WrittenWeights:
    """What a `ShardWriter` wrote."""

    num_files: int
    num_tensors: int
    num_parameters: int
    total_size: int
    """Bytes of all tensors."""


class ShardWriter:
    """Writes tensors as `model.safetensors`, or as shards with their index, as `save_pretrained` names them.

    A tensor that is larger than a shard may be gets a file of its own. Use it as a context manager; the files have
    their names when it ends.

    Args:
        folder: Where the files go.
        max_shard_size: Bytes per file at most.
    """

    def __init__(self, folder: Path, max_shard_size: int) -> None:
        self._folder = folder
        self._max_shard_size = max_shard_size
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self._total_size = 0
        self._num_parameters = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self._finish()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; files are written as they fill."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_shard_size:
            self._flush()
        # safetensors refuses views and shared memory, and a view would keep all of what it looks at alive.
        self._pending[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._pending_bytes += size
        self._total_size += size
        self._num_parameters += tensor.numel()

    @property
    def written(self) -> WrittenWeights:
        """What there is so far."""
        tensors = sum(len(names) for names in self._files)
        return WrittenWeights(len(self._files), tensors, self._num_parameters, self._total_size)

    def _flush(self) -> None:
        if self._pending:
            save_file(self._pending, self._folder / f"shard-{len(self._files)}.tmp", metadata={"format": "pt"})
            self._files.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _finish(self) -> None:
        self._flush()
        num = len(self._files)
        names = [f"model-{i + 1:05d}-of-{num:05d}.safetensors" for i in range(num)] if num > 1 else [_SINGLE[0]]
        for number, name in enumerate(names[:num]):
            (self._folder / f"shard-{number}.tmp").rename(self._folder / name)
        if num > 1:
            weight_map = {tensor: name for name, tensors in zip(names, self._files, strict=True) for tensor in tensors}
            metadata = {"total_parameters": self._num_parameters, "total_size": self._total_size}
            index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            (self._folder / _INDEXES[0]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
