"""Exchange jobs and answers with a measured process: JSON on its command line, JSON in a file.

This module runs in every environment, so it uses only the standard library.
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
"""System message of every row, given to all peers, so that they tokenize the same text."""


def run(measure: Callable[[Job], Answer]) -> None:
    """Run the job on the command line, and write its answer to the file that it names."""
    job = json.loads(sys.argv[1])
    Path(job["answer"]).write_text(json.dumps(measure(job)))


def records(job: Job) -> Iterator[dict[str, str]]:
    """Read the rows: instruction, input (may be empty), output."""
    with Path(job["rows"]).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def question(record: dict[str, str]) -> str:
    """Return the user message of a row: the instruction, then the input on a separate line."""
    return f"{record['instruction']}\n{record['input']}" if record["input"] else record["instruction"]


def seconds_of(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the wall-clock seconds of an action, and its result."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def peak_memory() -> int:
    """Return the largest resident set of this process, in bytes.

    This reads `VmHWM` instead of `ru_maxrss`, because a child process inherits the `ru_maxrss` of its parent.
    """
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    if not found:
        raise OSError("/proc/self/status has no VmHWM; peak memory is measured on Linux")
    return int(found[1]) * 1024


def versions(*names: str) -> dict[str, str]:
    """Return the installed versions of packages."""
    return {name: version(name) for name in names}
