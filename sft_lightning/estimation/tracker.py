"""Bytes of tensors that are alive, counted as operations make them; for fake tensors and for real ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class StorageTracker(TorchDispatchMode):
    """Counts the storages that operations inside the context make, until they are freed.

    A view shares its storage and counts nothing. What a kernel takes and gives back within itself is not seen.

    Args:
        known: Tensors that are there already and are not counted: weights, optimizer states.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        """Bytes alive now."""

        self.peak = 0
        """Most bytes that were alive at once."""

        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._remember(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, out)
        return out

    def _see(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._remember(storage, storage.nbytes())
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        return tensor

    def _remember(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = storage._cdata

        def forget(_: Any) -> None:
            self.live -= num_bytes
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, forget)
