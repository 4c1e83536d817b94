"""Compare two processes with one on the CPU: speed, bytes sent and memory of each strategy, with the theory.

    python benchmarks/scaling.py [--repeats 1] [--only ddp fsdp2 deepspeed_stage_1 …]

The model is a Llama of 80 M parameters (hidden 640, 12 layers, float32). It is fully fine-tuned with AdamW on four rows
of 512 tokens per optimizer step, which two processes share, with one thread per process and gloo. Efficiency is the
time of a step of one process, divided by twice that of two processes; the fastest step counts.

All amounts are in copies of the model:

- sent: bytes that a process sends per step. In theory, a collective over P bytes costs a process (N-1)/N · P if it is
  an all-gather or a reduce-scatter, and twice that if it is an all-reduce. DDP all-reduces the gradients; ZeRO-1 and -2
  reduce-scatter them and all-gather the weights; FSDP2 and ZeRO-3 all-gather the weights twice and reduce-scatter the
  gradients once (Rajbhandari et al., 2019, arXiv:1910.02054, section 7).
- held: tensors of a process between steps. In theory, these are weights, gradients and Adam's two moments, some of
  which the strategy divides. DeepSpeed has freed most gradients by then, and keeps a float32 copy of the weights.
- loading, ready: the largest memory of all processes together (PSS) until the model is loaded, and until the first
  step, above their memory before loading.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE / "peers"))

from cpu_fit import fit, write_config  # noqa: E402
from numbers_model import text_of, write_model  # noqa: E402
from processes import empty_folder, use_two_cores  # noqa: E402
from results import print_table, write_results  # noqa: E402

VOCABULARY, LENGTH, ROWS, STEPS = 16_000, 512, 4, 5
GATHERED = {"all_reduce": 2.0, "_allgather_base_": 1.0, "_reduce_scatter_base_": 1.0}
"""Cost of a collective for a process, in (N-1)/N of its bytes."""

THEORY_SENT = {"ddp": 2, "fsdp2": 3, "deepspeed_stage_1": 2, "deepspeed_stage_2": 2, "deepspeed_stage_3": 3}
"""Bytes sent per step, in (N-1)/N of the model's bytes."""

THEORY_HELD = {
    "one process": (16, 0), "ddp": (16, 0), "fsdp2": (0, 16), "deepspeed_stage_1": (4, 12),
    "deepspeed_stage_2": (4, 12), "deepspeed_stage_3": (0, 20),
}  # fmt: skip
"""Bytes per parameter: those that every process holds, and those that are divided among the processes."""


def write_inputs(folder: Path) -> int:
    """Write the model, its tokenizer and the rows; return the bytes of the model."""
    size = write_model(folder / "model", vocab_size=VOCABULARY, hidden=640, intermediate=1728, layers=12, heads=10)
    ids = torch.randint(2, VOCABULARY, (ROWS * STEPS, LENGTH - 1)).tolist()
    rows = (json.dumps({"text": text_of(row)}) for row in ids)
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return size


def write_run(folder: Path, strategy: str, processes: int, model: Mapping[str, Any] = {}) -> Path:
    """Write the configuration of a run, and return its file.

    Args:
        folder: Folder of `write_inputs`.
        strategy: `trainer.strategy`.
        processes: Number of processes.
        model: Further keys under `model`.
    """
    return write_config(
        folder, f"{strategy}_{processes}", watch="scaling_watch.ScalingWatch",
        model={
            "model_name_or_path": str(folder / "model"), "dtype": "float32", "gradient_checkpointing": False,
            "lr_scheduler": {"name": "constant"}, **model,
        },
        data={"max_length": LENGTH, "batch_size": ROWS // processes},
        trainer={"devices": processes, "strategy": strategy, "max_steps": STEPS, "gradient_clip_val": 0},
    )  # fmt: skip


def pss(process: psutil.Process) -> int:
    """Return the memory (PSS) of a process and its children, in bytes."""
    try:
        family = [process, *process.children(recursive=True)]
        return sum(each.memory_full_info().pss for each in family)
    except psutil.NoSuchProcess:
        return 0


def run(folder: Path, strategy: str, processes: int, model: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Run a strategy, and return its fastest step, the bytes it sent and its memory.

    Args:
        folder: Folder of `write_inputs`.
        strategy: `trainer.strategy`.
        processes: Number of processes.
        model: Further keys under `model`.
    """
    ranks, held = fit(write_run(folder, strategy, processes, model), pss, seconds=0.05)
    empty = sum(rank["bytes_empty"] for rank in ranks)
    first = min(rank["marks"]["empty"] for rank in ranks)

    def peak(until: str) -> int:
        last = max(rank["marks"][until] for rank in ranks)
        return max((amount for when, amount in held if first <= when <= last), default=empty) - empty

    return {
        "seconds": min(max(times) for times in zip(*(rank["seconds"] for rank in ranks), strict=True)),
        "bytes_by_collective": ranks[0]["bytes_by_collective"],
        "bytes_held": max(rank["bytes_live"] for rank in ranks),
        "bytes_peak": max(rank["bytes_peak"] for rank in ranks),
        "bytes_loading": peak("loaded"),
        "bytes_ready": peak("ready"),
    }


def sent_bytes(by_collective: Mapping[str, int], processes: int) -> float:
    """Return what a process sends, from what its collectives were over."""
    amounts = dict(by_collective)
    # gloo scatters by reducing for all, which is not the strategy's doing.
    amounts["all_reduce"] = amounts.get("all_reduce", 0) - amounts.get("_reduce_scatter_base_", 0)
    return sum(GATHERED[name] * (processes - 1) / processes * amount for name, amount in amounts.items())


def rows(found: Mapping[str, dict[str, Any]], model_bytes: int) -> list[list[str]]:
    """Return the table: a strategy a row."""
    alone = found["one process"]["seconds"]
    table = []
    for name, answer in found.items():
        processes = 1 if name == "one process" else 2
        whole, divided = THEORY_HELD[name]
        theory_held = (whole + divided / processes) / 4
        sent, theory_sent = sent_bytes(answer["bytes_by_collective"], processes), THEORY_SENT.get(name, 0)
        table.append([
            name,
            f"{answer['seconds']:.2f}",
            "" if processes == 1 else f"{alone / (processes * answer['seconds']):.0%}",
            f"{sent / model_bytes:.2f}",
            f"{theory_sent * (processes - 1) / processes:.2f}",
            f"{answer['bytes_held'] / model_bytes:.2f}",
            f"{theory_held:.2f}",
            f"{answer['bytes_loading'] / model_bytes:.2f}",
            f"{answer['bytes_ready'] / model_bytes:.2f}",
        ])  # fmt: skip
    return table


HEAD = ["", "s a step", "efficiency", "sent", "theory", "held", "theory", "loading", "ready"]


def main() -> None:
    """Measure, write the results, and print them as tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1, help="Runs per strategy; the fastest counts.")
    parser.add_argument("--only", nargs="+", choices=list(THEORY_SENT), default=list(THEORY_SENT), help="Strategies.")
    args = parser.parse_args()
    use_two_cores()
    with empty_folder() as folder:
        model_bytes = write_inputs(folder)
        ways = [("one process", "auto", 1), *((name, name, 2) for name in args.only)]
        found = {
            name: min((run(folder, strategy, n) for _ in range(args.repeats)), key=lambda answer: answer["seconds"])
            for name, strategy, n in ways
        }
    print_table(HEAD, rows(found, model_bytes))
    write_results(
        "scaling_cpu", python=platform.python_version(), torch=torch.__version__, model_bytes=model_bytes,
        repeats=args.repeats, ways=found,
    )  # fmt: skip


if __name__ == "__main__":
    main()
