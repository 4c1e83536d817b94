"""Runs that are launched as on a cluster: two torchrun agents that meet, and SIGTERM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

LAUNCH = Path(__file__).parents[2] / "configs/launch"
Logged = Callable[[Path, str], list[float]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_agents_meet_and_learn_what_one_process_learns(
    runs: Any, alone: Callable[[str], Path], logged: Logged, tmp_path: Path, strategy: str
) -> None:
    folder = tmp_path / "run"
    args = runs.command(folder, "lora", processes=2, strategy=strategy)[4:]
    args = [arg for arg in args if not arg.startswith("--trainer.devices")]
    environment = {
        **os.environ,
        "HEAD": f"127.0.0.1:{free_port()}",
        "NODES": "2",
        "GPUS": "1",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    agents = [
        subprocess.Popen(
            ["sh", str(LAUNCH / "torchrun.sh"), *args],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        said = [agent.communicate(timeout=300)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    expected = logged(alone("lora"), "train/loss")
    assert logged(folder, "train/loss") == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "strategy"), [(1, "auto"), (2, "ddp"), (2, "fsdp2")])
def test_sigterm_writes_a_checkpoint_and_the_restart_continues(
    runs: Any, logged: Logged, tmp_path: Path, processes: int, strategy: str
) -> None:
    where: Any = {"processes": processes, "strategy": strategy}
    long = ("--trainer.max_steps=2000", "--trainer.max_epochs=-1", "--model.lr_scheduler.name=constant")
    folder = tmp_path / "run"
    with subprocess.Popen(
        runs.command(folder, "lora", *long, **where),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        try:
            wait_for(lambda: (folder / "metrics.csv").is_file())
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=90)[0]
        finally:
            process.kill()
    assert process.returncode == 143, said[-3000:]
    assert "continue with --ckpt_path last" in said
    assert (folder / "checkpoints/last.ckpt").is_file()
    before = logged(folder, "train/loss")
    done = torch.load(folder / "checkpoints/last.ckpt")["global_step"]
    assert len(before) == done
    steps = (f"--trainer.max_steps={done + 3}", *long[1:])
    again = tmp_path / "again"
    runs(again, "lora", *steps, f"--ckpt_path={folder / 'checkpoints/last.ckpt'}", **where)
    runs(tmp_path / "whole", "lora", *steps)
    whole = logged(tmp_path / "whole", "train/loss")
    assert [*before, *logged(again, "train/loss")] == pytest.approx(whole, rel=1e-5)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


@pytest.mark.parametrize("file", ["torchrun.sh", "slurm.sbatch"])
def test_launch_scripts_are_shell(file: str) -> None:
    shell = "sh" if file.endswith(".sh") else "bash"
    assert subprocess.run([shell, "-n", str(LAUNCH / file)], check=False).returncode == 0
