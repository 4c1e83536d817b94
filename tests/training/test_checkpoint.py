from __future__ import annotations

import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sft_lightning.errors import UserError
from sft_lightning.training.checkpoint import (
    AtomicCheckpointIO,
    RandomStates,
    check_run_folder,
    check_trainable_state,
    random_state,
    rewind_to_step_start,
    set_random_state,
    trainable_state,
)


def half_frozen() -> torch.nn.Linear:
    model = torch.nn.Linear(2, 2)
    model.weight.requires_grad = False
    return model


def test_only_trainable_weights_are_kept() -> None:
    model = half_frozen()
    assert list(trainable_state(model, model.state_dict())) == ["bias"]


@pytest.mark.parametrize("keys", [[], ["bias", "weight"]])
def test_weights_that_are_missing_or_do_not_train_here_are_refused(keys: list[str]) -> None:
    model = half_frozen()
    with pytest.raises(UserError, match="--ckpt_path: the checkpoint was saved with different keys under model"):
        check_trainable_state(model, {key: model.state_dict()[key] for key in keys})


def test_random_states_read_from_a_file_continue_with_the_same_numbers(tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "state.pt")
    first = (torch.rand(3), np.random.rand(3), random.random())
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    second = (torch.rand(3), np.random.rand(3), random.random())
    assert torch.equal(first[0], second[0])
    assert first[1].tolist() == second[1].tolist()
    assert first[2] == second[2]


def drawn() -> float:
    return float(torch.rand(()))


def test_loaded_random_states_are_continued_once() -> None:
    torch.manual_seed(1)
    saved = random_state()
    expected = drawn()
    states = RandomStates()
    assert not states.continue_loaded()
    states.load([saved], rank=0)
    torch.manual_seed(2)
    assert states.continue_loaded()
    assert drawn() == expected
    assert not states.continue_loaded()


def test_more_processes_than_before_share_the_saved_states_in_turn() -> None:
    saved = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        saved.append(random_state())
    found = []
    for rank in range(3):
        states = RandomStates()
        states.load(saved, rank)
        states.continue_loaded()
        found.append(drawn())
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("within_step", [True, False])
def test_a_checkpoint_within_a_step_saves_the_states_from_before_its_first_micro_batch(within_step: bool) -> None:
    torch.manual_seed(1)
    states = RandomStates()
    states.note_step_start()
    before, now = drawn(), random_state()
    after = drawn()
    set_random_state(now)
    [saved] = states.gather(within_step=within_step)
    set_random_state(saved)
    assert drawn() == (before if within_step else after)


def test_loaded_states_that_were_never_continued_are_saved_again() -> None:
    torch.manual_seed(1)
    loaded, expected = random_state(), drawn()
    states = RandomStates()
    states.load([loaded], rank=0)
    [saved] = states.gather(within_step=False)
    set_random_state(saved)
    assert drawn() == expected


class Rows:
    """Twelve micro-batches an epoch, four of them a step."""

    def micro_batches_done(self, position: dict[str, int]) -> int:
        return position["rows"] // 4 * 4

    def is_within_epoch(self, position: dict[str, int]) -> bool:
        return position["rows"] < 12


@pytest.mark.parametrize(("rows", "micro_batches", "completed_epochs"), [(4, 4, 0), (6, 4, 0), (12, 12, 1)])
def test_a_position_is_set_to_the_start_of_its_optimizer_step(
    rows: int, micro_batches: int, completed_epochs: int
) -> None:
    counters = {"ready": rows, "completed": rows}
    fit_loop: dict[str, Any] = {
        "state_dict": {"combined_loader": [{"epoch": 0, "rows": rows}]},
        "epoch_loop.batch_progress": {"current": dict(counters), "total": dict(counters), "is_last_batch": True},
        "epoch_progress": {"current": {"processed": 1, "completed": 1}, "total": {"processed": 1, "completed": 1}},
    }
    rewind_to_step_start(fit_loop, Rows())  # type: ignore[arg-type]
    progress = fit_loop["epoch_loop.batch_progress"]
    assert progress["current"] == progress["total"] == {"ready": micro_batches, "completed": micro_batches}
    assert fit_loop["epoch_progress"]["current"]["completed"] == completed_epochs


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
    with pytest.raises(UserError, match=r"default_root_dir: cannot write to '.*run': Not a directory"):
        check_run_folder(tmp_path / "file" / "run", None)


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
def test_a_run_folder_must_be_new_or_continued(
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
