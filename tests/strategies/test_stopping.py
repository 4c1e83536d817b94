"""Covers sft_lightning.strategies.preemption, sft_lightning.strategies.fsdp2.strategy and
sft_lightning.strategies.zero.strategy.

Runs that SIGTERM or the death of a rank stops, and their continuation.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

Logged = Callable[[Path, str], list[float]]
LONG = ("--trainer.max_epochs=-1", "--model.lr_scheduler.name=constant")
EVERY_5 = (
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=5",
    "--trainer.callbacks.save_top_k=-1",
    "--trainer.callbacks.save_last=true",
    "--trainer.callbacks.filename={step}",
)
UNINTERRUPTED_STEPS = 80
FURTHER_STEPS = 3
WITHIN_SECONDS = 60
"""Longest time from the signal to the end of all processes, on a busy machine."""

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed extra")
STRATEGIES = [
    "ddp",
    "fsdp2",
    pytest.param("deepspeed_stage_2", marks=needs_deepspeed),
    pytest.param("deepspeed_stage_3", marks=needs_deepspeed),
]


@dataclass(frozen=True)
class Stopped:
    """The end of a stopped run."""

    status: int
    """Exit status of rank 0, which starts the other ranks."""

    seconds: float
    """From the signal until the end of all processes."""

    said: str
    """Output of all processes."""


@pytest.fixture(scope="module")
def uninterrupted(runs: Any, logged: Logged, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[float]]:
    """The losses of a run that is not stopped, made once for each strategy."""
    made: dict[str, list[float]] = {}

    def losses(**where: Any) -> list[float]:
        name = where["strategy"]
        if name not in made:
            folder = tmp_path_factory.mktemp(f"uninterrupted_{name}")
            runs(folder, "lora", *LONG, f"--trainer.max_steps={UNINTERRUPTED_STEPS}", **where)
            made[name] = logged(folder, "train/loss")
        return made[name]

    return losses


def stop(command: list[str], ready: Path, send: Callable[[list[int]], None]) -> Stopped:
    """Start a run, signal its processes once a file exists, and wait for their end.

    Args:
        command: Command of the run.
        ready: The file.
        send: Signals the processes; gets their ids by rank.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment
    ) as process:
        try:
            wait_for(ready.is_file)
            ranks = [process.pid, *started_by(process.pid)]
            begin = time.monotonic()
            send(ranks)
            said = process.communicate(timeout=WITHIN_SECONDS)[0]
            wait_for(lambda: not any(is_alive(rank) for rank in ranks), WITHIN_SECONDS)
            seconds = time.monotonic() - begin
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    print(f"{seconds:.1f} s, status {process.returncode}")
    return Stopped(process.returncode, seconds, said)


def started_by(pid: int) -> list[int]:
    """The Python processes that a process has started."""
    children = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in children if b"sft_lightning" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.1)


def to(*ranks: int, signum: signal.Signals) -> Callable[[list[int]], None]:
    """Signal some ranks, or all of them."""
    return lambda pids: [os.kill(pid, signum) for rank, pid in enumerate(pids) if not ranks or rank in ranks]  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(0,), (1,), ()], ids=["rank 0", "rank 1", "all"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sigterm_writes_a_checkpoint_and_the_restart_continues(
    runs: Any, logged: Logged, uninterrupted: Callable[..., list[float]], tmp_path: Path, strategy: str, ranks: Any
) -> None:
    folder, where = tmp_path / "run", {"processes": 2, "strategy": strategy}
    command = runs.command(folder, "lora", *LONG, "--trainer.max_steps=2000", **where)
    stopped = stop(command, folder / "metrics.csv", to(*ranks, signum=signal.SIGTERM))
    assert stopped.status == 143, stopped.said[-3000:]
    assert "continue with --ckpt_path last" in stopped.said
    done = torch.load(folder / "checkpoints/last.ckpt")["global_step"]
    expected = uninterrupted(**where)
    assert logged(folder, "train/loss") == expected[:done]
    assert_continues(runs, logged, folder, done, expected, **where)


@pytest.mark.slow
def test_sigterm_to_a_single_process_writes_a_checkpoint_too(
    runs: Any, logged: Logged, uninterrupted: Callable[..., list[float]], tmp_path: Path
) -> None:
    folder, where = tmp_path / "run", {"processes": 1, "strategy": "auto"}
    command = runs.command(folder, "lora", *LONG, "--trainer.max_steps=2000", **where)
    stopped = stop(command, folder / "metrics.csv", to(0, signum=signal.SIGTERM))
    assert stopped.status == 143, stopped.said[-3000:]
    done = torch.load(folder / "checkpoints/last.ckpt")["global_step"]
    assert_continues(runs, logged, folder, done, uninterrupted(**where), **where)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1], ids=["rank 0", "rank 1"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_death_of_a_rank_ends_the_other_and_the_restart_continues(
    runs: Any, logged: Logged, uninterrupted: Callable[..., list[float]], tmp_path: Path, strategy: str, dead: int
) -> None:
    folder, where = tmp_path / "run", {"processes": 2, "strategy": strategy}
    command = runs.command(folder, "lora", *LONG, *EVERY_5, "--trainer.max_steps=2000", **where)
    stopped = stop(command, folder / "checkpoints/last.ckpt", to(dead, signum=signal.SIGKILL))
    assert stopped.status != 0
    assert "onnection" in stopped.said, stopped.said[-3000:]  # gloo's message about a lost peer
    done = torch.load(folder / "checkpoints/last.ckpt")["global_step"]
    assert_continues(runs, logged, folder, done, uninterrupted(**where), **where)


def assert_continues(runs: Any, logged: Logged, folder: Path, done: int, expected: list[float], **where: Any) -> None:
    """Check that `--ckpt_path last` continues to the same bits, and a single process to the same losses."""
    steps = (*LONG, f"--trainer.max_steps={done + FURTHER_STEPS}", "--ckpt_path=last")
    for name, place in {"again": where, "alone": {}}.items():
        there = folder.with_name(name)
        shutil.copytree(folder / "checkpoints", there / "checkpoints")
        runs(there, "lora", *steps, **place)
        found, wanted = logged(there, "train/loss"), expected[done : done + FURTHER_STEPS]
        assert len(wanted) == FURTHER_STEPS
        assert found == (wanted if place == where else pytest.approx(wanted, rel=1e-5)), name
