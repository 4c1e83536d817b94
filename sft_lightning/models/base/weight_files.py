"""The weight files of a Hugging Face folder, read and written tensor by tensor, with one file in memory at most."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from sft_lightning.errors import UserError

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_SAMPLED_TENSORS, _SAMPLED_PARTS, _SAMPLED_VALUES = 2048, 8, 128


def weight_files(folder: Path) -> list[Path]:
    """Return a model's weight files: safetensors before `.bin`, and a single file before shards with an index.

    Raises:
        UserError: If there are none, or a shard is missing.
    """
    for single, index in zip(_SINGLE, _INDEXES, strict=True):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            files = [folder / name for name in sorted(set(_weight_map(folder / index).values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise UserError(f"{folder / index}: the file {missing[0]} is missing; download the model again")
            return files
    raise UserError(f"{folder}: there are no weights; expected one of {', '.join(_SINGLE + _INDEXES)}")


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file name of every tensor."""
    weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return weight_map


def tensor_names(folder: Path) -> set[str]:
    """Return the names of all tensors in a folder's weight files, without reading the tensors."""
    return {name for file in weight_files(folder) for name in _names_in(file)}


def _names_in(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as reader:
            return list(reader.keys())
    return list(_load_bin(file))


def read_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and tensors of a weight file; each tensor is read when it is yielded."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (no mapping)
                yield name, reader.get_tensor(name)
        return
    state = _load_bin(file)
    for name in list(state):
        yield name, state.pop(name)


def read_named_tensors(folder: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return some tensors of a folder by name; others are not read.

    Args:
        folder: The folder of a model. The files of a decoder without a head lack the first part of the names.
        names: Names in the model; those that no file has are left out.
    """
    wanted = {key: name for name in names for key in (name, name.partition(".")[2])}
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as reader:
                found |= {wanted[key]: reader.get_tensor(key) for key in reader.keys() if key in wanted}  # noqa: SIM118
        else:
            found |= {wanted[key]: tensor for key, tensor in read_tensors(file) if key in wanted}
    return found


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    try:
        state: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        state = torch.load(file, map_location="cpu", weights_only=True)  # the format before torch 1.6 is not a zip file
    return state


def weights_fingerprint(folder: Path) -> str:
    """Return a hash of a sample of the weights: the same for the same model in other files, names or 32 and 16 bits.

    Up to 2048 matrices are read in 8 places each, 128 values at a time, rounded to bfloat16: of a 70B model, 1.5 MB.

    Args:
        folder: A Hugging Face folder.

    Raises:
        UserError: If there are no weight files, or a shard is missing.
    """
    shapes = {name: file for file in weight_files(folder) for name in _names_in(file)}
    chosen = sorted(shapes)[:: -(-len(shapes) // _SAMPLED_TENSORS)]
    found = set()
    for file in sorted({shapes[name] for name in chosen}):
        for _, tensor in _mapped_tensors(file, [name for name in chosen if shapes[name] == file]):
            if tensor.dim() in (2, 3) and tensor.numel():  # others are vectors, or buffers that not every file has
                found.add(_sample_hash(tensor))
    return xxhash.xxh3_64_hexdigest(" ".join(sorted(found)).encode())


def _sample_hash(tensor: torch.Tensor) -> str:
    flat, size = tensor.reshape(-1), min(_SAMPLED_VALUES, tensor.numel())
    starts = [part * (len(flat) - size) // (_SAMPLED_PARTS - 1) for part in range(_SAMPLED_PARTS)]
    values = torch.cat([flat[start : start + size] for start in starts])
    values = values.to(torch.bfloat16) if values.is_floating_point() else values
    digest = xxhash.xxh3_64(str(tuple(tensor.shape)).encode())
    digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _mapped_tensors(file: Path, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield some tensors of a file, of which only the parts that are used are read."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as reader:
            for name in names:
                yield name, reader.get_tensor(name)
        return
    state = _load_bin(file)
    yield from ((name, state[name]) for name in names)


class ShardWriter:
    """Writes tensors as `model.safetensors`, or as shards with an index, under the names that `save_pretrained` uses.

    A tensor that is larger than `max_shard_size` gets a file of its own. Use the writer as a context manager; the files
    get their final names when it ends without an error.

    Args:
        folder: The folder to write to.
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
        """Add a tensor; a file is written when it is full.

        Args:
            name: The tensor's name.
            tensor: A tensor of any shape; it is copied.
        """
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_shard_size:
            self._flush()
        # safetensors refuses views and shared memory, and a view would keep its whole storage alive.
        self._pending[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._pending_bytes += size
        self._total_size += size
        self._num_parameters += tensor.numel()

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
