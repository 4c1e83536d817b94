"""Checkpoint files: each is written as a whole or not at all, and checked before it is loaded."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from sft_lightning.errors import UserError
from sft_lightning.models.export.target import replaced_file
from sft_lightning.models.inspection import nonfinite_names

NONFINITE_LOSSES = "nonfinite_losses"
"""Key of a checkpoint that is being saved: the number of optimizer steps in a row whose loss was not finite."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name in the same folder, flushes it to the disk, and renames it.

    A process that is killed at any moment leaves either the old file or the new one. Lightning's own writer uses the
    system's temporary folder; copying a file from there to another file system can be interrupted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._keeps_files = False  # since a checkpoint was not written

        self.after_save: list[Callable[[Path], None]] = []
        """Functions that are called with the path of each written checkpoint."""

        self.after_remove: list[Callable[[Path], None]] = []
        """Functions that are called with the path of each removed checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint file, unless the loss is not finite: the run may recover, but the file would be worse.

        Args:
            checkpoint: What it contains.
            path: Where to write it.
            storage_options: Not supported, because files are written to local file systems only.

        Raises:
            UserError: If the file cannot be written, for instance because the disk is full, or if the weights are not
                finite, from which no run recovers.
        """
        if storage_options is not None:
            raise TypeError("storage_options are for remote file systems; checkpoints are written to local ones only")
        target = Path(path)
        self._keeps_files = False
        if names := nonfinite_names(checkpoint.get("state_dict", {})):
            raise _diverged(target, checkpoint["global_step"], names)
        if losses := checkpoint.pop(NONFINITE_LOSSES, 0):
            self._keeps_files = True
            rank_zero_info(
                f"the checkpoint {target} is not written, because the loss was NaN or infinite in the last {losses} "
                f"optimizer steps; {_way_back(target)}"
            )
            return
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
        """Remove a checkpoint file, unless it is older than one that was not written."""
        if self._keeps_files:
            return
        super().remove_checkpoint(path)
        for listener in self.after_remove:
            listener(Path(path))


def _diverged(target: Path, step: int, names: list[str]) -> UserError:
    return UserError(
        f"the weights are NaN or infinite after optimizer step {step} ({len(names)} tensors, such as {names[0]}), so "
        f"the checkpoint {str(target)!r} is not written; {_way_back(target)}. Continue from a finite checkpoint with a "
        "lower learning rate (model.optimizer.init_args.lr), or with bfloat16 or float32 instead of float16"
    )


def _way_back(target: Path) -> str:
    """Return a text that names the newest checkpoint beside `target` whose weights are finite."""
    found = sorted(target.parent.glob("[!.]*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    newest = next((path for path in found if _is_finite(path)), None)
    return f"the newest finite checkpoint is {str(newest)!r}" if newest else "there is no earlier finite checkpoint"


def _is_finite(path: Path) -> bool:
    if damage_of(path):
        return False
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return not nonfinite_names(checkpoint.get("state_dict", {}))


def _write_atomically(checkpoint: dict[str, Any], target: Path) -> None:
    """Give a file its name only when all of it is on the disk."""
    for left_by_a_killed_process in target.parent.glob(".*.ckpt.*.tmp"):
        left_by_a_killed_process.unlink(missing_ok=True)
    with replaced_file(target) as file:
        torch.save(checkpoint, file)


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
