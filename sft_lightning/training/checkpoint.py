"""What a checkpoint holds, and how it reaches the disk: whole or not at all.

Only trainable weights are kept, never the frozen base; beside them Lightning keeps the optimizer, the schedule and the
position in the data, and we add the random states, so that dropout continues to the same bits.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH


def trainable_state(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the part of a state dict that trains."""
    trainable = _trainable_names(module)
    return {name: tensor for name, tensor in state.items() if name in trainable}


def check_trainable_state(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Check that a state is what `trainable_state` returns for this module.

    Raises:
        RuntimeError: If the keys are not exactly the trainable parameters: the configuration is another one.
    """
    trainable = _trainable_names(module)
    missing, extra = sorted(trainable - state.keys()), sorted(state.keys() - trainable)
    if missing or extra:
        raise RuntimeError(
            "the checkpoint is of another configuration: "
            f"{len(missing)} trainable weights are not in it ({', '.join(missing[:3])}…), "
            f"{len(extra)} of its weights do not train here ({', '.join(extra[:3])}…)"
        )


def _trainable_names(module: torch.nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def random_state() -> dict[str, Any]:
    """Return the states of all random generators of this process, as values that `torch.load` reads safely."""
    algorithm, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [algorithm, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Continue the random generators where `random_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), position, has_gauss, cached))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes under a temporary name in the same folder, flushes to the disk, and renames.

    A process killed at any moment leaves either the old file or the new one. Lightning's own writer stages in the
    system's temporary folder, from which a file may have to be copied, and a copy can be cut short.
    """

    def __init__(self) -> None:
        super().__init__()
        self.after_save: list[Callable[[Path], None]] = []
        """Called with the path of every checkpoint that was written."""

        self.after_remove: list[Callable[[Path], None]] = []
        """Called with the path of every checkpoint that was removed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Save a checkpoint file."""
        if storage_options is not None:
            raise TypeError("storage_options are for remote file systems, which this checkpoint IO does not write to")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        for listener in self.after_save:
            listener(target)

    def remove_checkpoint(self, path: _PATH) -> None:
        """Remove a checkpoint file."""
        super().remove_checkpoint(path)
        for listener in self.after_remove:
            listener(Path(path))
