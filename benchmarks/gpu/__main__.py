"""Measure training steps on this machine's GPU, cell by cell, in about ten minutes.

    python -m benchmarks.gpu [--cells NAME …] [--minutes 10] [--list] [--toy]

Every cell runs 3 + 10 optimizer steps (warm-up, timed) on random weights that are drawn on the device; nothing is
downloaded. Cells of a group share a process. After each cell the results are written to
`benchmarks/results/<device>_<date>.json` and to a table beside it; started again, the command continues with the
cells that are missing. `--toy` runs the same cells at toy size, on the CPU too; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu import results
from benchmarks.gpu.cells import CELLS, Cell, cells_named

ROOT = Path(__file__).parents[2]
MARK = "RESULT "
LIBRARIES = (
    "torch", "transformers", "peft", "lightning", "bitsandbytes", "triton", "liger-kernel", "trl", "flash-attn",
)  # fmt: skip


def run_cell(cell: Cell, *, toy: bool) -> dict[str, Any]:
    """Measure one cell in this process; an error, or a library that is not installed, is a result, too.

    Args:
        cell: The cell.
        toy: Whether to run it at toy size.
    """
    import torch

    from benchmarks.gpu import ceilings, inputs, ours, peers
    from benchmarks.gpu.clock import StepClock
    from sft_lightning.errors import UserError
    from sft_lightning.estimation.devices import peak_tflops

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    cell = inputs.toy(cell) if toy else cell
    clock = StepClock(device, warmup=1 if toy else 3, steps=2 if toy else 10)
    try:
        if cell.kind == "ceiling":
            return ceilings.ceiling(cell, device, repeats=clock.steps)
        with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
            config = inputs.write_inputs(cell, Path(folder), clock.total)
            train = {"fit": ours.fit, "bare": ours.bare, "peft": peers.peft, "trl": peers.trl}[cell.kind]
            answer = train(cell, config, clock)
        peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        if peak is not None and "flops_per_token" in answer:
            answer["mfu"] = answer["flops_per_token"] * answer["tokens_per_second"] / (1e12 * peak)
        return answer
    except ImportError as error:
        return {"not_installed": str(error)}
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def work(names: list[str], *, toy: bool) -> None:
    """Measure cells one after the other, and print each result as a line of JSON: the process of a group."""
    import gc

    import torch

    from sft_lightning.cli.quiet import quiet_libraries

    quiet_libraries()
    for cell in cells_named(names):
        answer = run_cell(cell, toy=toy)
        print(MARK + json.dumps({"cell": cell.name, "answer": answer}), flush=True)
        gc.collect()
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measured(cells: list[Cell], *, toy: bool, seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the cells of one group in a process; yield the name and the result of each as it arrives.

    A process that dies leaves an error at the cell that it was at, and the next cells get a new one.

    Args:
        cells: Cells of one group.
        toy: Whether to run them at toy size.
        seconds: Time for all; a process that takes longer is ended, and its unfinished cells have no result.
    """
    names = [cell.name for cell in cells]
    end = time.monotonic() + seconds
    while names:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu", *(["--toy"] if toy else []), "--worker", *names],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env={"PYTORCH_ALLOC_CONF": "expandable_segments:True", **os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        timer = _end_after(process, end - time.monotonic())
        for line in process.stdout or ():
            if line.startswith(MARK):
                found = json.loads(line.removeprefix(MARK))
                names.remove(found["cell"])
                yield found["cell"], found["answer"]
            else:
                sys.stderr.write(line)
        status = process.wait()
        timer.cancel()
        if time.monotonic() >= end:
            return
        if names and status:
            yield names.pop(0), {"error": f"the process ended with status {status}"}


def _end_after(process: subprocess.Popen[str], seconds: float) -> Any:
    from threading import Timer

    timer = Timer(max(0.0, seconds), process.kill)
    timer.daemon = True
    timer.start()
    return timer


def facts(*, toy: bool) -> dict[str, Any]:
    """Return the device and the installed versions."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"device": f"{device} toy" if toy else device, "python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure the cells that have no result yet; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="+", default=[], metavar="NAME", help="Cells or groups (default: all).")
    parser.add_argument("--minutes", type=float, default=10.0, help="Start no cell after this time (default: 10).")
    parser.add_argument("--again", action="store_true", help="Measure cells that have a result, too.")
    parser.add_argument("--results", type=Path, default=None, help="File to continue or write.")
    parser.add_argument("--list", action="store_true", help="List the cells.")
    parser.add_argument("--toy", action="store_true", help="Run the cells at toy size.")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(args.worker, toy=args.toy)
        return 0
    cells = cells_named(args.cells)
    if args.list:
        print("\n".join(f"{cell.group:12}{cell.name}" for cell in cells))
        return 0
    here = facts(toy=args.toy)
    if here["device"] == "cpu":
        raise SystemExit("python -m benchmarks.gpu: no CUDA device; add --toy to try the cells at toy size on this CPU")
    return measure(cells, here, args)


def measure(cells: list[Cell], here: dict[str, Any], args: argparse.Namespace) -> int:
    """Measure cells group by group, and write each result at once; return 1 if one failed.

    Args:
        cells: The cells.
        here: The device and the versions.
        args: The options of the command line.
    """
    file = args.results or results.result_file(here["device"])
    found = {**here, **results.read(file)}
    end = time.monotonic() + 60 * args.minutes
    wanted = cells if args.again else results.missing(cells, found)
    for group, together in itertools.groupby(wanted, key=lambda cell: cell.group):
        members = list(together)
        if time.monotonic() >= end:
            break
        print(f"{group}: {', '.join(cell.name for cell in members)}", flush=True)
        for name, answer in measured(members, toy=args.toy, seconds=end - time.monotonic()):
            found["cells"][name] = answer
            found["finished"] = not results.missing(list(CELLS), found)
            results.write(file, found)
            speed = answer.get("tokens_per_second")
            print(f"  {name}: " + (f"{speed:,.0f} tokens/s" if speed else str(answer)), flush=True)
    left = results.missing(cells, found)
    print(f"{file}" + (f"; {len(left)} cells are left, run the same command again" if left else ""))
    return int(any("error" in found["cells"].get(cell.name, {}) for cell in cells))


if __name__ == "__main__":
    raise SystemExit(main())
