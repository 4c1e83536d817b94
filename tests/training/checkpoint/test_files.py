from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from sft_lightning.errors import UserError
from sft_lightning.training.checkpoint.files import AtomicCheckpointIO


def test_listeners_are_called_with_written_and_removed_files(tmp_path: Path) -> None:
    heard: list[str] = []
    writer = AtomicCheckpointIO()
    writer.after_save.append(lambda path: heard.append(f"saved {path.name}"))
    writer.after_remove.append(lambda path: heard.append(f"removed {path.name}"))
    writer.save_checkpoint({"x": 1}, tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt") == {"x": 1}
    writer.remove_checkpoint(tmp_path / "a.ckpt")
    assert heard == ["saved a.ckpt", "removed a.ckpt"]


def write_until_killed(path: Path, written: int) -> None:
    """Save checkpoint after checkpoint, and write a byte to a pipe after each."""
    writer, number = AtomicCheckpointIO(), 0
    while True:
        number += 1
        writer.save_checkpoint({"number": number, "data": torch.full((400_000,), number)}, path)
        os.write(written, b".")


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.011])
def test_a_process_killed_while_writing_leaves_a_whole_checkpoint(delay: float, tmp_path: Path) -> None:
    path, (progress, written) = tmp_path / "last.ckpt", os.pipe()
    process = os.fork()
    if process == 0:
        try:
            write_until_killed(path, written)
        finally:
            os._exit(1)
    for _ in range(3):
        os.read(progress, 1)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    os.close(progress)
    os.close(written)
    found = torch.load(path)
    assert found["number"] >= 3
    assert (found["data"] == found["number"]).all()


def test_a_full_disk_gives_one_message_and_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    writer, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    writer.save_checkpoint({"number": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoint '.*last.ckpt' cannot be written: File too large;"):
            writer.save_checkpoint({"number": 2, "data": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(path) == {"number": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_be_written_to_gives_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: File exists"):
        AtomicCheckpointIO().save_checkpoint({"x": 1}, tmp_path / "file" / "last.ckpt")


def test_an_error_of_a_saved_object_is_not_reported_as_one_of_the_disk(tmp_path: Path) -> None:
    class Broken:
        def __reduce__(self) -> str:
            raise RuntimeError("no state")

    with pytest.raises(RuntimeError, match="no state"):
        AtomicCheckpointIO().save_checkpoint({"x": Broken()}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_file_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step=8.ckpt.123.tmp").write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint({"x": 1}, tmp_path / "last.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
