from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sft_lightning.training.checkpoint import (
    AtomicCheckpointIO,
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
    with pytest.raises(RuntimeError, match="another configuration"):
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
