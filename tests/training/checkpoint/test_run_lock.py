from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_lightning.errors import UserError
from sft_lightning.training.checkpoint import run_lock
from sft_lightning.training.checkpoint.run_lock import lock_run_folder, unlock_run_folders

HOLD = """
import sys, time
from pathlib import Path
from sft_lightning.training.checkpoint.run_lock import lock_run_folder
lock_run_folder(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _unlocked() -> Iterator[None]:
    yield
    unlock_run_folders()


def test_a_second_run_is_refused_until_the_first_one_dies(tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(
            UserError, match=rf"in use by another run \(process {first.pid} on {socket.gethostname()}\)"
        ):
            lock_run_folder(tmp_path)
    finally:
        first.kill()
        first.communicate()
    lock_run_folder(tmp_path)
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_one_process_may_take_its_own_folder_again(tmp_path: Path) -> None:
    for _ in range(2):
        lock_run_folder(tmp_path)
    unlock_run_folders()
    lock_run_folder(tmp_path)


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(run_lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", unsupported)
    lock_run_folder(tmp_path)
    assert "has no locks" in caplog.text
