"""Measure CPU memory and time while two processes load and shard a model.

    python benchmarks/loading.py [--only fsdp2 deepspeed_stage_3]

Each strategy loads weights in the data type of their files (mapped), in another type (converted), and in 4 bits. Memory
is in copies of the loaded model: float32, or 4 bits with the weights that are not quantized. `own` is the memory of the
processes alone (anonymous pages) above what they had before loading. `mapped` are pages of the weight files, which the
system can reclaim.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE / "peers"))

from cpu_fit import fit, write_config  # noqa: E402
from numbers_model import text_of, write_model  # noqa: E402
from processes import empty_folder, use_two_cores  # noqa: E402
from results import print_table, write_results  # noqa: E402

PROCESSES = 2
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "mapped": ("float32", {}),
    "converted": ("bfloat16", {}),
    "4 bits": ("bfloat16", {"adapter": {"r": 4}, "quantization": {"bits": 4}}),
}
"""For each way to load: the data type of the files, and further keys under `model`."""


def write_inputs(folder: Path) -> None:
    """Write the model in both data types, with its tokenizer, and a few rows."""
    write_model(folder / "float32", vocab_size=512, hidden=3072, intermediate=8192, layers=4, heads=24)
    model = AutoModelForCausalLM.from_pretrained(folder / "float32", dtype=torch.bfloat16)
    write_model(
        folder / "bfloat16", vocab_size=512, hidden=16, intermediate=16, layers=1, heads=1
    )  # writes the tokenizer
    model.save_pretrained(folder / "bfloat16")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": text_of(range(2, 34))}) for _ in range(8)))


def held(process: psutil.Process) -> tuple[int, int]:
    """Return the anonymous and the mapped bytes of a process and its children, with shared pages counted once."""
    own = mapped = 0
    try:
        for each in [process, *process.children(recursive=True)]:
            rollup = Path(f"/proc/{each.pid}/smaps_rollup").read_text()
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in rollup.splitlines()[1:]}
            own, mapped = own + found["Pss_Anon"], mapped + found["Pss_File"]
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return 0, 0  # the process has just ended
    return own, mapped


def run(folder: Path, way: str, strategy: str) -> dict[str, float]:
    """Load a model once.

    Args:
        folder: Folder of `write_inputs`.
        way: A key of `WAYS`.
        strategy: `trainer.strategy`.

    Returns:
        The largest memory while loading, in bytes above the memory before, and the seconds.
    """
    stored, keys = WAYS[way]
    config = write_config(
        folder, f"{strategy}_{way}", watch="loading_watch.LoadingWatch",
        model={"model_name_or_path": str(folder / stored), "dtype": "float32", **keys},
        data={"max_length": 64, "batch_size": 1},
        trainer={"devices": PROCESSES, "strategy": strategy, "max_steps": 1},
    )  # fmt: skip
    environment = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # freed memory is returned to the system at once
    marks, samples = fit(config, held, seconds=0.02, environment=environment)
    first, last = min(mark["empty"] for mark in marks), max(mark["sharded"] for mark in marks)
    before = next(sample for when, sample in reversed(samples) if when <= first)
    during = [sample for when, sample in samples if first <= when <= last]
    return {
        "own": max(own for own, _ in during) - before[0],
        "mapped": max(mapped for _, mapped in during) - before[1],
        "own_afterwards": during[-1][0] - before[0],
        "seconds": last - first,
    }


def copy_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes of the loaded model for each of `WAYS`."""
    config = json.loads((folder / "float32" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "float32")
    total = sum(parameter.numel() for parameter in model.parameters())
    quantized = total - 2 * config["vocab_size"] * config["hidden_size"]
    # 4 bits per weight, and an 8-bit constant per 64 weights.
    return {"mapped": 4 * total, "converted": 4 * total, "4 bits": 4 * (total - quantized) + quantized * 33 // 64}


def main() -> None:
    """Measure, write the results, and print them as tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["fsdp2", "deepspeed_stage_3"], help="Strategies.")
    args = parser.parse_args()
    use_two_cores()
    with empty_folder() as folder:
        write_inputs(folder)
        sizes = copy_bytes(folder)
        found = {(strategy, way): run(folder, way, strategy) for strategy in args.only for way in WAYS}
    head = ["", "weights", "a copy, MiB", "own at most", "afterwards", "mapped at most", "seconds"]
    table = [
        [
            strategy, way, f"{sizes[way] / 2**20:,.0f}",
            *(f"{answer[key] / sizes[way]:.2f}" for key in ("own", "own_afterwards", "mapped")),
            f"{answer['seconds']:.0f}",
        ]
        for (strategy, way), answer in found.items()
    ]  # fmt: skip
    print_table(head, table)
    answers = [{"strategy": strategy, "weights": way, **answer} for (strategy, way), answer in found.items()]
    write_results(
        "loading_cpu", python=platform.python_version(), torch=torch.__version__, copy_bytes=sizes, found=answers
    )


if __name__ == "__main__":
    main()
