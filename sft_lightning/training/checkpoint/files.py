"""Checkpoint files: each is written as a whole or not at all, and checked before it is loaded."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from sft_lightning.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name in the same folder, flushes it to the disk, and renames it.

    A process that is killed at any moment leaves either the old file or the new one. Lightning's own writer uses the
    system's temporary folder; copying a file from there to another file system can be interrupted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.after_save: list[Callable[[Path], None]] = []
        """Functions that are called with the path of each written checkpoint."""

        self.after_remove: list[Callable[[Path], None]] = []
        """Functions that are called with the path of each removed checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint file.

        Args:
            checkpoint: What it contains.
            path: Where to write it.
            storage_options: Not supported, because files are written to local file systems only.

        Raises:
            UserError: If the file cannot be written, for instance because the disk is full.
        """
        if storage_options is not None:
            raise TypeError("storage_options are for remote file systems; checkpoints are written to local ones only")
        target = Path(path)
        try:
            _write_atomically(checkpoint, target)
        except (OSError, RuntimeError) as error:
            # torch's writer replaces the error of the file by one of its own.
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            raise UserError(
                f"trainer.default_root_dir: the checkpoint {str(target)!r} cannot be written: {reason.strerror}; "
                "earlier checkpoints are unchanged. Make room or choose another folder, and continue with --ckpt_path"
            ) from error
        for listener in self.after_save:
            listener(target)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint file."""
        super().remove_checkpoint(path)
        for listener in self.after_remove:
            listener(Path(path))


def _write_atomically(checkpoint: dict[str, Any], target: Path) -> None:
    """Give a file its name only when all of it is on the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left_by_a_killed_process in target.parent.glob(".*.ckpt.*.tmp"):
        left_by_a_killed_process.unlink(missing_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def damage_of(path: Path) -> str | None:
    """Return what is wrong with a checkpoint file, or `None` if it is whole.

    `torch.save` writes a checksum of every tensor, which `torch.load` does not compare. Reading a file takes about a
    second per GiB.
    """
    try:
        with zipfile.ZipFile(path) as file:
            wrong = file.testzip()
    except (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, RuntimeError) as error:
        return str(error) or type(error).__name__
    return None if wrong is None else f"the checksum of {wrong} differs"
