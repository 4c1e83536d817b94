"""Measure how long help and listings take, compared with the imports that they need.

    python benchmarks/startup.py            # ours, and the peers whose environments exist
    python benchmarks/startup.py --peers    # creates the peers' environments first

Each command runs several times in a new process. The commands take turns, and the fastest run of each counts. Other
work on the machine affects CPU seconds less than wall-clock seconds.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE / "peers"))

from environments import PEERS, environment  # noqa: E402
from job import versions  # noqa: E402
from processes import use_two_cores  # noqa: E402
from results import print_table, write_results  # noqa: E402

OURS = {
    "import tokenizers": ["-c", "import tokenizers"],
    "import torch, lightning.pytorch": ["-c", "import torch, lightning.pytorch"],
    "--help": ["-m", "sft_lightning", "--help"],
    "preview --list_templates": ["-m", "sft_lightning", "preview", "--list_templates"],
    "prepare --help": ["-m", "sft_lightning", "prepare", "--help"],
    "chat --help": ["-m", "sft_lightning", "chat", "--help"],
    "fit --help": ["-m", "sft_lightning", "fit", "--help"],
}
"""Arguments of our Python by name."""

THEIRS = {"trl": ["trl", "sft", "--help"], "llamafactory": ["llamafactory-cli", "version"]}
"""For each peer, a command of its environment that does no work."""


class Timing(NamedTuple):
    """Seconds of the fastest run."""

    wall: float
    """Wall-clock seconds from start to exit."""

    cpu: float
    """CPU seconds of all threads, user and system."""


def time_once(command: Sequence[str]) -> Timing:
    """Run a command in a new process, and return its seconds.

    Raises:
        SystemExit: If it fails; the end of its output is shown.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return Timing(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def time_all(commands: Mapping[str, Sequence[str]], repeats: int) -> dict[str, Timing]:
    """Time the commands in turns, and return the fastest seconds of each.

    Args:
        commands: Command lines by name.
        repeats: Runs of each command.
    """
    runs: dict[str, list[Timing]] = {name: [] for name in commands}
    for number in range(repeats):
        for name, command in commands.items():
            print(f"{number + 1}/{repeats} {name} …", flush=True)
            runs[name].append(time_once(command))
    return {name: Timing(min(t.wall for t in each), min(t.cpu for t in each)) for name, each in runs.items()}


def peer_commands(envs: Path, *, make: bool) -> dict[str, list[str]]:
    """Return the commands of the peers whose environments exist.

    Args:
        envs: Folder of the environments.
        make: Whether to create missing environments.
    """
    commands = {}
    for name, (program, *args) in THEIRS.items():
        if make:
            environment(PEERS[name], envs)
        path = (envs / name / "bin" / program).resolve()
        if path.exists():
            commands[" ".join([program, *args])] = [str(path), *args]
        else:
            print(f"{name}: no environment in {envs}; create it with --peers")
    return commands


def main() -> None:
    """Measure, print the table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="Runs of each command; the fastest counts.")
    parser.add_argument("--peers", action="store_true", help="Create the peers' environments if they are missing.")
    parser.add_argument("--envs", type=Path, default=_HERE.parent / ".bench-envs", help="Environments of the peers.")
    args = parser.parse_args()
    commands = {name: [sys.executable, *arguments] for name, arguments in OURS.items()}
    commands |= peer_commands(args.envs, make=args.peers)
    use_two_cores()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    timings = time_all(commands, args.repeats)
    print_table(
        ["command", "wall, s", "CPU, s"],
        [[f"`{name}`", f"{each.wall:.2f}", f"{each.cpu:.2f}"] for name, each in timings.items()],
    )
    seconds = {name: timing._asdict() for name, timing in timings.items()}
    used = versions("jsonargparse", "lightning", "tokenizers", "torch", "transformers")
    write_results("startup_cpu", repeats=args.repeats, versions=used, seconds=seconds)


if __name__ == "__main__":
    main()
