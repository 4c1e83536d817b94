"""How a measured process hears what to do and answers: JSON on its command line, JSON in a file.

Runs in every environment, so it knows the standard library alone.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Answer = dict[str, Any]

SYSTEM = "You are a helpful assistant."
"""The system message of every rendered row, said to everyone, so that all tokenize the same text."""


def run(measure: Callable[[Job], Answer]) -> None:
    """Measure what the command line asks for and write the answer where it says."""
    job = json.loads(sys.argv[1])
    Path(job["answer"]).write_text(json.dumps(measure(job)))


def records(job: Job) -> Iterator[dict[str, str]]:
    """Read the rows: instruction, input (may be empty), output."""
    with Path(job["rows"]).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def question(record: dict[str, str]) -> str:
    """Return the user message of a row: the instruction and, on a line of its own, the input."""
    return f"{record['instruction']}\n{record['input']}" if record["input"] else record["instruction"]


def seconds_of(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the wall-clock seconds of an action, and what it returns."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def peak_memory() -> int:
    """Return the largest resident set of this process, in bytes.

    `VmHWM` and not `ru_maxrss`: a child inherits its parent's `ru_maxrss`, which may be the larger one.
    """
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    if not found:
        raise OSError("/proc/self/status has no VmHWM; peak memory is measured on Linux")
    return int(found[1]) * 1024


def versions(*names: str) -> dict[str, str]:
    """Return the installed versions of packages."""
    return {name: version(name) for name in names}
