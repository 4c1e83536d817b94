"""Loading a model that no process keeps whole: a host holds one copy of what is loaded, not one for each process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info

TIMEOUT = timedelta(hours=2)
"""How long a process that has its shard waits in a collective for those whose turn to load comes last."""


@contextmanager
def one_process_at_a_time(*, wanted: bool) -> Iterator[None]:
    """Let the processes of this run that share a host into the block one after the other.

    Args:
        wanted: Do so at all; weights that are only mapped are shared by all processes as it is.
    """
    if not wanted:
        yield
        return
    rank_zero_info(
        "loading: one process of a host after the other, because each makes a copy of the weights for a while"
    )
    with FileLock(_lock_file()):  # a process that dies gives it back
        yield


def _lock_file() -> Path:
    """Return a file of this host, this user and this run, whose processes meet at one port."""
    return Path(tempfile.gettempdir()) / f"sft_lightning_{os.getuid()}_{os.environ.get('MASTER_PORT', 0)}.lock"
