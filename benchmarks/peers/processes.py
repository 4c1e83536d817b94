"""Run a measurement in its own process, in an empty folder, on the first two cores."""

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
    """Restrict this process and its children to two cores, for which the targets are stated."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])


def hardware() -> str:
    """Return the processor, the number of cores used, and the memory."""
    named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{named[1] if named else platform.machine()}, {NUM_CORES} cores, {memory:.0f} GiB"


@contextmanager
def empty_folder() -> Iterator[Path]:
    """Yield an empty folder, and remove it afterwards."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        yield Path(folder)


def measure(script: str, job: Job, *, python: Path | None = None) -> Answer:
    """Run a script of this folder in a fresh process with empty caches.

    Args:
        script: Name of the script, `run_….py`.
        job: Its job.
        python: Python of the environment; default: ours.

    Raises:
        SystemExit: If the script fails; the end of its output is shown.
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
