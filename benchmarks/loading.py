"""Host memory of a load by two processes that shard the model: how many copies of it they hold at most, and how long.

    python benchmarks/loading.py

Each strategy loads weights of the type in their files (mapped), of another type (converted), and in 4 bits. A copy is
the model as it is loaded: float32, or 4 bits with what is not quantized. `own` is memory of the processes alone
(anonymous pages), above what they had before; `mapped` are pages of the weight files, which the system takes back.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE / "peers"))

from numbers_model import text_of, write_model  # noqa: E402
from processes import empty_folder, use_two_cores  # noqa: E402
from results import print_table, write_results  # noqa: E402

PROCESSES = 2
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "mapped": ("float32", {}),
    "converted": ("bfloat16", {}),
    "4 bits": ("bfloat16", {"adapter": {"r": 4}, "quantization": {"bits": 4}}),
}
"""Each with the type in the files, and what the module is told."""


def write_inputs(folder: Path) -> None:
    """Write the model in both types, its tokenizer and a few rows."""
    write_model(folder / "float32", vocab_size=512, hidden=3072, intermediate=8192, layers=4, heads=24)
    model = AutoModelForCausalLM.from_pretrained(folder / "float32", dtype=torch.bfloat16)
    write_model(folder / "bfloat16", vocab_size=512, hidden=16, intermediate=16, layers=1, heads=1)  # for its tokenizer
    model.save_pretrained(folder / "bfloat16")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": text_of(range(2, 34))}) for _ in range(8)))


def command(folder: Path, way: str, strategy: str) -> list[str]:
    """Return the run whose load is looked at."""
    stored, asked = WAYS[way]
    config = {
        "task": "pretrain",
        "model": {"model_name_or_path": str(folder / stored), "dtype": "float32", **asked},
        "data": {
            "sources": {"rows": {"path": str(folder / "rows.jsonl")}}, "max_length": 64, "packing": "none",
            "batch_size": 1, "store_dir": str(folder / "stores"),
        },
        "trainer": {
            "accelerator": "cpu", "devices": PROCESSES, "strategy": strategy, "max_steps": 1, "logger": False,
            "enable_checkpointing": False, "enable_progress_bar": False,
            "default_root_dir": str(folder / f"{strategy}_{way}"),
            "callbacks": [
                {"class_path": "loading_watch.LoadingWatch"},
                {"class_path": "callbacks.SampleGeneration", "init_args": {"prompts": []}},
            ],
        },
    }  # fmt: skip
    file = folder / f"{strategy}_{way}.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    return [sys.executable, "-m", "sft_lightning", "fit", "--config", str(file)]


def held(process: psutil.Process) -> tuple[int, int]:
    """Return the anonymous and the mapped bytes of a process and all that it started, shared pages counted once."""
    own = mapped = 0
    try:
        for each in [process, *process.children(recursive=True)]:
            rollup = Path(f"/proc/{each.pid}/smaps_rollup").read_text()
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in rollup.splitlines()[1:]}
            own, mapped = own + found["Pss_Anon"], mapped + found["Pss_File"]
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return 0, 0  # it has just ended
    return own, mapped


def run(folder: Path, way: str, strategy: str) -> dict[str, float]:
    """Load once; return the largest memory meanwhile, in bytes above what was held before, and the seconds."""
    answers = folder / f"answers_{strategy}_{way}"
    answers.mkdir()
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "LOADING_FOLDER": str(answers), "HF_HUB_OFFLINE": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**20),  # what is freed is given back, not kept for the next
        "PYTHONPATH": os.pathsep.join([str(_HERE / "peers"), str(_HERE.parent)]),
    }  # fmt: skip
    seen: list[tuple[float, int, int]] = []
    with (answers / "said.txt").open("w") as said:
        started = psutil.Popen(command(folder, way, strategy), env=environment, stdout=said, stderr=subprocess.STDOUT)
        while started.poll() is None:
            seen.append((time.time(), *held(started)))
            time.sleep(0.02)
    if started.returncode:
        raise SystemExit(f"{strategy}, {way} failed:\n{(answers / 'said.txt').read_text()[-3000:]}")
    marks = [json.loads((answers / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    first, last = min(mark["empty"] for mark in marks), max(mark["sharded"] for mark in marks)
    before = next(entry for entry in reversed(seen) if entry[0] <= first)
    during = [entry for entry in seen if first <= entry[0] <= last]
    return {
        "own": max(entry[1] for entry in during) - before[1],
        "mapped": max(entry[2] for entry in during) - before[2],
        "own_afterwards": during[-1][1] - before[1],
        "seconds": last - first,
    }


def copy_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes of the model as each way loads it."""
    config = json.loads((folder / "float32" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "float32")
    total = sum(parameter.numel() for parameter in model.parameters())
    quantized = total - 2 * config["vocab_size"] * config["hidden_size"]
    # 4 bits, and an 8-bit constant of each 64 weights.
    return {"mapped": 4 * total, "converted": 4 * total, "4 bits": 4 * (total - quantized) + quantized * 33 // 64}


def main() -> None:
    """Measure, print the table (as Markdown too), write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["fsdp2", "deepspeed_stage_3"])
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
