"""Covers configs/launch.

Runs that are launched as on a cluster, by two torchrun agents.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.parametrize("file", ["torchrun.sh", "slurm.sbatch"])
def test_launch_scripts_have_valid_syntax(file: str) -> None:
    shell = "sh" if file.endswith(".sh") else "bash"
    assert subprocess.run([shell, "-n", str(LAUNCH / file)], check=False).returncode == 0
