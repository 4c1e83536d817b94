"""Commands in forked processes: the libraries are imported once, the packages anew for each command.

Most of a tiny run is the import of torch, transformers, Lightning and PEFT. The parent imports them, and nothing of
this project; each command forks it, puts a copy of the packages first on the path, and runs there as a new process
would.
"""

from __future__ import annotations

import atexit
import importlib
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Before torch is imported: threads of OpenMP do not survive a fork, and for models this small two are slower.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

LIBRARIES = (
    "lightning.pytorch.callbacks", "lightning.pytorch.cli", "lightning.pytorch.loggers", "lightning.pytorch.strategies",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama", "transformers.quantizers.auto", "transformers.generation.utils",
    "transformers.integrations.bitsandbytes", "transformers.quantizers.quantizer_bnb_4bit",
    "transformers.modeling_utils", "transformers.generation",
    "peft", "bitsandbytes", "accelerate", "datasets", "pandas", "torchmetrics", "jsonargparse", "rich.table",
    "torch.utils.tensorboard", "torch.distributed.tensor", "torch._dynamo",
)  # fmt: skip
"""What the commands import, apart from this project."""

OURS = ("sft_lightning", "callbacks")
"""The packages of this project."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int | None
    """Exit status, the highest of its processes; `None` if it was still running at its time limit."""

    seconds: float
    """Wall time."""

    output: str
    """What rank 0 wrote to stdout and stderr."""

    @property
    def message(self) -> str:
        """The line that tells why it ended: the error, else the last line."""
        if self.status is None:
            return f"still running after {self.seconds:.0f} s"
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or [""])[-1].removeprefix("error: ")


def warm_up() -> None:
    """Import the libraries into this process.

    Raises:
        RuntimeError: If a package of this project came with them.
    """
    for name in LIBRARIES:
        importlib.import_module(name)
    if ours := sorted(name for name in sys.modules if name.partition(".")[0] in OURS):
        raise RuntimeError(f"forked commands would not import their own copy of {ours[0]}")


def run(
    args: Sequence[str], *, packages: Path, folder: Path, environment: Mapping[str, str], processes: int, limit: float
) -> Ended:
    """Run `python -m sft_lightning` in forked processes, and wait for it.

    Args:
        args: Arguments of the command line.
        packages: Folder with the packages.
        folder: Working directory.
        environment: Changes to the environment.
        processes: Number of processes, as a launcher would start them.
        limit: Seconds after which all of them are killed.
    """
    start = time.monotonic()
    logs = [folder / f".rank{rank}.log" for rank in range(processes)]
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "TORCHELASTIC_RUN_ID": "faults"}
    children = []
    for rank, log in enumerate(logs):
        more = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)} | launched
        child = os.fork()
        if not child:
            _become(args, packages, folder, {**environment, **(more if processes > 1 else {})}, log)
        children.append(child)
    statuses = _wait(children, start + limit)
    output = logs[0].read_text(encoding="utf-8", errors="replace")
    return Ended(None if None in statuses else max(map(_as_int, statuses)), time.monotonic() - start, output)


def _as_int(status: int | None) -> int:
    return 0 if status is None else status


def _wait(children: Sequence[int], deadline: float) -> list[int | None]:
    """Return the exit statuses; when one process has failed, or the time is over, the others are killed."""
    statuses: dict[int, int | None] = {}
    while len(statuses) < len(children):
        for child in children:
            if child in statuses:
                continue
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                statuses[child] = code if code >= 0 else 128 - code
        failed = any(statuses.values())
        if time.monotonic() > deadline or (failed and len(statuses) < len(children)):
            if failed:
                time.sleep(2)  # the others may be about to say the same
            for child in children:
                if child not in statuses:
                    os.killpg(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    statuses[child] = 0 if failed else None
        time.sleep(0.01)
    return [statuses[child] for child in children]


def _become(args: Sequence[str], packages: Path, folder: Path, environment: Mapping[str, str], log: Path) -> None:
    """Turn this forked process into the command; does not return."""
    status = 1
    try:
        os.setsid()
        with log.open("wb", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(folder)
        os.environ.update(environment, PYTHONPATH=str(packages))
        sys.path.insert(0, str(packages))
        sys.argv = ["sft_lightning", *args]
        # Lightning read the rank when it was imported, in the parent.
        importlib.import_module("lightning.pytorch.utilities").rank_zero_only.rank = int(environment.get("RANK", 0))
        atexit._clear()
        status = _run_module()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _run_module() -> int:
    try:
        runpy.run_module("sft_lightning", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # as the interpreter does
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
