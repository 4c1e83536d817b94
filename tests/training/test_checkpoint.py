from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sft_lightning.errors import UserError
from sft_lightning.training.checkpoint import (
    AtomicCheckpointIO,
    check_run_folder,
    check_trainable_state,
    random_state,
    set_random_state,
    trainable_state,
)


def half_frozen() -> torch.nn.Linear:
    model = torch.nn.Linear(2, 2)
    model.weight.requires_grad = False
    return model


def test_only_what_trains_is_kept() -> None:
    model = half_frozen()
    assert list(trainable_state(model, model.state_dict())) == ["bias"]


@pytest.mark.parametrize("keys", [[], ["bias", "weight"]])
def test_a_state_of_another_configuration_is_refused(keys: list[str]) -> None:
    model = half_frozen()
    with pytest.raises(UserError, match="--ckpt_path: the checkpoint was saved with different keys under model"):
        check_trainable_state(model, {key: model.state_dict()[key] for key in keys})


def test_the_random_states_survive_a_file_and_continue_alike(tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "state.pt")
    first = (torch.rand(3), np.random.rand(3), random.random())
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    second = (torch.rand(3), np.random.rand(3), random.random())
    assert torch.equal(first[0], second[0])
    assert first[1].tolist() == second[1].tolist()
    assert first[2] == second[2]


def test_listeners_hear_of_files_written_and_removed(tmp_path: Path) -> None:
    heard: list[str] = []
    writer = AtomicCheckpointIO()
    writer.after_save.append(lambda path: heard.append(f"saved {path.name}"))
    writer.after_remove.append(lambda path: heard.append(f"removed {path.name}"))
    writer.save_checkpoint({"x": 1}, tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt") == {"x": 1}
    writer.remove_checkpoint(tmp_path / "a.ckpt")
    assert heard == ["saved a.ckpt", "removed a.ckpt"]


WRITER = """
import sys, torch
from sft_lightning.training.checkpoint import AtomicCheckpointIO
writer, number = AtomicCheckpointIO(), 0
while True:
    number += 1
    writer.save_checkpoint({"number": number, "data": torch.full((400_000,), number)}, sys.argv[1])
    print(number, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.011])
def test_a_process_killed_while_writing_leaves_a_whole_checkpoint(delay: float, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    found = torch.load(path)
    assert found["number"] >= 3
    assert (found["data"] == found["number"]).all()


def test_a_full_disk_is_one_message_and_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
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


def test_a_folder_that_cannot_be_written_to_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: File exists"):
        AtomicCheckpointIO().save_checkpoint({"x": 1}, tmp_path / "file" / "last.ckpt")
    with pytest.raises(UserError, match=r"default_root_dir: cannot write to '.*run': Not a directory"):
        check_run_folder(tmp_path / "file" / "run", None)


def test_an_error_in_what_is_saved_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    class Broken:
        def __reduce__(self) -> str:
            raise RuntimeError("no state")

    with pytest.raises(RuntimeError, match="no state"):
        AtomicCheckpointIO().save_checkpoint({"x": Broken()}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step=8.ckpt.123.tmp").write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint({"x": 1}, tmp_path / "last.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("files", "ckpt_path", "message"),
    [
        ([], None, None),
        (["config.yaml", "events.out.tfevents.1"], None, None),  # stopped before anything was trained
        (["checkpoints/.last.ckpt.123.tmp"], "last", None),  # killed while it wrote its first checkpoint
        ([], "last", None),
        (["checkpoints/last.ckpt"], "last", None),
        (["checkpoints/step=8.ckpt"], "run/checkpoints/step=8.ckpt", None),
        (
            ["checkpoints/last.ckpt", "adapter/adapter_config.json"],
            None,
            "checkpoints and adapter .*_path last,",
        ),
        (["checkpoints/step=8.ckpt"], "last", r"--ckpt_path .*/step=8.ckpt, choose another folder"),
        (["model/config.json"], "last", r"holds the model of an earlier run; choose another folder, or remove it"),
    ],
)
def test_a_folder_is_used_if_it_is_new_or_continued_from(
    files: list[str], ckpt_path: str | None, message: str | None, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).touch()
    if message is None:
        from_the_beginning = ckpt_path == "last" and "checkpoints/last.ckpt" not in files
        assert check_run_folder(tmp_path / "run", ckpt_path) is from_the_beginning
        assert (tmp_path / "run").is_dir()
    else:
        with pytest.raises(UserError, match=message):
            check_run_folder(tmp_path / "run", ckpt_path)
