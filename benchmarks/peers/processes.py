"""Runs a measurement in a process of its own, in an empty folder, on the first two cores."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from job import Answer, Job

_HERE = Path(__file__).parent
NUM_CORES = 2


def use_two_cores() -> None:
    """Keep this process and all that it starts on two cores, as the targets are stated for two."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])


def hardware() -> str:
    """Name the processor, the cores used and the memory."""
    named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{named[1] if named else platform.machine()}, {NUM_CORES} cores, {memory:.0f} GiB"


@contextmanager
def empty_folder() -> Iterator[Path]:
    """Give a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        yield Path(folder)


def measure(script: str, job: Job, *, python: Path | None = None) -> Answer:
    """Run `script` of this folder in a fresh process whose caches are empty.

    Args:
        script: `run_….py`.
        job: What it is told.
        python: The environment's; default: ours.

    Raises:
        SystemExit: If it fails; what it printed last is shown.
    """
    with empty_folder() as folder:
        answer = folder / "answer.json"
        caches = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        done = subprocess.run(
            [python or sys.executable, _HERE / script, json.dumps({**job, "answer": str(answer)})],
            cwd=folder, env={**os.environ, **caches}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{script} {job} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        found: Answer = json.loads(answer.read_text())
        return found


def fastest(answers: Iterable[Answer]) -> Answer:
    """Return the answer with the fewest seconds."""
    return min(answers, key=lambda answer: float(answer["seconds"]))
