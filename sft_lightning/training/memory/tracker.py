"""Count the bytes of live tensors, fake or real, as operations make them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

from sft_lightning.compat.torch import storage_key, watching_operations


class StorageTracker:
    """Counts the storages that operations make while the context is open, until they are freed.

    A view shares its storage and is not counted. Memory that a kernel allocates and frees by itself is not seen.

    Args:
        known: Existing tensors, of any shape, that are not counted: weights, optimizer states.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        self.live = 0
        """Bytes that are alive now."""

        self.peak = 0
        """Largest number of bytes alive at once."""

        self._operations = watching_operations(self._see)
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._remember(tensor.untyped_storage(), 0)

    def __enter__(self) -> StorageTracker:
        self._operations.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._operations.__exit__(*error)

    def _see(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage_key(storage) not in self._seen:
            self._remember(storage, storage.nbytes())
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        return tensor

    def _remember(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = storage_key(storage)

        def forget(_: Any) -> None:
            self.live -= num_bytes
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, forget)
