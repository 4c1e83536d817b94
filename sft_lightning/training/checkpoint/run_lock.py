"""The lock of a run folder: two runs in one folder would overwrite each other's checkpoints."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import IO

from sft_lightning.errors import UserError

logger = logging.getLogger(__name__)

_FILE = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
_held: dict[Path, IO[str]] = {}
"""Lock files of this process, open: the system unlocks them when the process ends, however it ends."""


def lock_run_folder(root: Path) -> None:
    """Lock a run folder for this process, until it ends or calls `unlock_run_folders`.

    Args:
        root: `trainer.default_root_dir`, which exists.

    Raises:
        UserError: If another process holds the lock; its process id and host are named.
    """
    file = (root / _FILE).resolve()
    if file in _held:
        return
    opened = file.open("a+", encoding="utf-8")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        opened.seek(0)
        owner = opened.read().strip() or "unknown"
        opened.close()
        if error.errno in _UNSUPPORTED:
            logger.warning("%s: this file system has no locks; two runs in one folder would not be noticed", root)
            return
        raise UserError(
            f"trainer.default_root_dir: {str(root)!r} is in use by another run ({owner}); wait until it ends, stop it, "
            "or choose another folder"
        ) from error
    opened.truncate(0)
    opened.write(f"process {os.getpid()} on {socket.gethostname()}")
    opened.flush()
    _held[file] = opened


def unlock_run_folders() -> None:
    """Unlock every run folder that this process has locked."""
    while _held:
        _, opened = _held.popitem()
        opened.close()
