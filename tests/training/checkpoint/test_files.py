from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_lightning.errors import UserError
from sft_lightning.training.checkpoint.files import NONFINITE_LOSSES, AtomicCheckpointIO


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


def checkpoint(step: int, value: float, losses: int = 0) -> dict[str, Any]:
    weights = {"a": torch.zeros(3), "b": torch.tensor([value])}
    return {"global_step": step, "state_dict": weights, NONFINITE_LOSSES: losses}


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    writer = AtomicCheckpointIO()
    for step, name in enumerate(("step=1", "last")):
        writer.save_checkpoint(checkpoint(step, 1.0), tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (step, step))
    torch.save(checkpoint(2, torch.nan), tmp_path / "step=2.ckpt")  # of an earlier version
    with pytest.raises(
        UserError, match=r"NaN or infinite after optimizer step 3 \(1 tensors, such as b\).* newest finite .*last.ckpt'"
    ):
        writer.save_checkpoint(checkpoint(3, torch.inf), tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 1
    with pytest.raises(UserError, match="there is no earlier finite checkpoint"):
        writer.save_checkpoint(checkpoint(3, torch.inf), tmp_path / "other" / "last.ckpt")


def test_while_the_loss_is_not_finite_checkpoints_are_neither_written_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("sft_lightning.training.checkpoint.files.rank_zero_info", said.append)
    writer = AtomicCheckpointIO()
    writer.save_checkpoint(checkpoint(1, 1.0), tmp_path / "step=1.ckpt")
    writer.save_checkpoint(checkpoint(2, 1.0, losses=2), tmp_path / "step=2.ckpt")
    writer.remove_checkpoint(tmp_path / "step=1.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["step=1.ckpt"]
    assert "in the last 2 optimizer steps; the newest finite checkpoint is " in said[0]
    writer.save_checkpoint(checkpoint(3, 1.0), tmp_path / "step=3.ckpt")
    writer.remove_checkpoint(tmp_path / "step=1.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["step=3.ckpt"]
    assert NONFINITE_LOSSES not in torch.load(tmp_path / "step=3.ckpt")
