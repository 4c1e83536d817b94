"""Compare the training speed of ours, a bare PyTorch loop and TRL in tokens per second.

    python benchmarks/train.py [--dtype bfloat16] [--repeats 3] [--only ours bare trl]

All train the same Llama of 19.5 M parameters (hidden 256, 4 layers, vocabulary 32000) on the same 256 documents of
Alpaca-like lengths, packed to 2048 tokens, one row per step, with fused AdamW and two threads, for eight steps. The
first step is not timed. Each variant runs in its own process.

Ours is the whole `fit` command with all its callbacks. The bare loop uses only our rows, our attention and our loss;
its losses must equal ours. TRL has its own environment (`peers/environments.py`), which the first run creates; it is
measured packed and unpacked. The variants take turns, and the best run of each counts.
Results are written to `benchmarks/results/` with hardware and versions.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE / "peers"))

from environments import PEERS, environment  # noqa: E402
from job import Answer, Job  # noqa: E402
from numbers_model import text_of, write_model  # noqa: E402
from processes import NUM_CORES, empty_folder, fastest, measure, use_two_cores  # noqa: E402
from results import write_results  # noqa: E402

VOCABULARY = 32_000
NUM_DOCUMENTS = 256
MAX_LENGTH = 2048
STEPS = 8
LR = 1e-4
LARGEST_LOSS_DIFFERENCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest difference of two losses over eight steps, from sums in a different order."""


def write_documents(file: Path) -> None:
    """Write random documents with Alpaca-like lengths."""
    generator = np.random.default_rng(1)
    lengths = generator.lognormal(4.8, 0.8, NUM_DOCUMENTS).astype(np.int64).clip(16, 1023)
    with file.open("w") as out:
        for length in lengths:
            text = text_of(generator.integers(2, VOCABULARY, length).tolist())
            out.write(json.dumps({"text": text}) + "\n")


def configuration(folder: Path, dtype: str) -> dict[str, Any]:
    """Return our configuration.

    Args:
        folder: Folder of the model and the documents.
        dtype: Data type of the weights.
    """
    return {
        "task": "pretrain",
        "model": {
            "model_name_or_path": str(folder / "model"),
            "dtype": dtype,
            "adapter": None,
            "gradient_checkpointing": False,
            "optimizer": {
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": LR, "weight_decay": 0.0, "fused": True},
            },
            "lr_scheduler": {"name": "constant"},
        },
        "data": {
            "sources": {"numbers": {"path": str(folder / "rows.jsonl")}},
            "max_length": MAX_LENGTH,
            "store_dir": str(folder / "stores"),
        },
    }


def write_jobs(folder: Path, dtype: str) -> dict[str, tuple[str, Job]]:
    """Write the model, the documents and the configurations; return script and job of each variant.

    Args:
        folder: Folder to write to.
        dtype: Data type of the weights.
    """
    write_model(folder / "model", vocab_size=VOCABULARY, hidden=256, intermediate=688, layers=4, heads=4)
    write_documents(folder / "rows.jsonl")
    config = configuration(folder, dtype)
    prepare, fit = folder / "prepare.yaml", folder / "fit.yaml"
    prepare.write_text(json.dumps(config))
    trainer = {
        "max_steps": STEPS, "accelerator": "cpu", "default_root_dir": "runs", "limit_val_batches": 0,
        "callbacks": [{"class_path": "watch.Watch"}],
    }  # fmt: skip
    fit.write_text(json.dumps({**config, "trainer": trainer}))
    job = {
        "config": str(fit), "prepare": str(prepare), "model": str(folder / "model"), "rows": str(folder / "rows.jsonl"),
        "dtype": dtype, "steps": STEPS, "lr": LR, "max_length": MAX_LENGTH, "threads": NUM_CORES,
    }  # fmt: skip
    return {
        "ours": ("run_ours_training.py", job),
        "bare": ("run_bare_training.py", job),
        "trl, packed": ("run_trl_training.py", {**job, "packing": True}),
        "trl, 8 padded rows": ("run_trl_training.py", {**job, "packing": False, "batch_size": 8}),
    }


def run(args: argparse.Namespace) -> dict[str, Answer]:
    """Measure all variants in turns, and return the fastest run of each."""
    python = environment(PEERS["trl"], args.envs) if "trl" in args.only else None
    use_two_cores()
    answers: dict[str, list[Answer]] = {}
    with empty_folder() as folder:
        jobs = write_jobs(folder, args.dtype)
        for _ in range(args.repeats):
            for name, (script, job) in jobs.items():
                peer = name.startswith("trl")
                if name.split(",")[0] in args.only:
                    answers.setdefault(name, []).append(measure(script, job, python=python if peer else None))
    return {name: fastest(found) for name, found in answers.items()}


def speed(answer: Answer) -> float:
    """Return tokens per second."""
    return float(answer["tokens"] / answer["seconds"])


def check_same_losses(ways: dict[str, Answer], dtype: str) -> float:
    """Return the largest difference between our losses and those of the bare loop.

    Args:
        ways: Answers of all variants.
        dtype: Data type of the weights.

    Raises:
        SystemExit: If the losses differ by more than rounding; the speeds cannot be compared then.
    """
    pairs = zip(ways["ours"]["losses"], ways["bare"]["losses"], strict=True)
    difference = max(abs(one - other) for one, other in pairs)
    if difference > LARGEST_LOSS_DIFFERENCE[dtype]:
        raise SystemExit(f"different training: our losses differ from those of the bare loop by up to {difference}")
    return float(difference)


def show(ways: dict[str, Answer]) -> None:
    """Print the table of all variants."""
    table = Table("", "tokens/s", "ours is … times as fast", "peak MiB above imports", "first and last loss")
    for name, answer in ways.items():
        ratio = f"{speed(ways['ours']) / speed(answer):.3f}" if "ours" in ways and name != "ours" else ""
        losses = answer["losses"]
        peak = f"{answer['peak_bytes_above_imports'] / 2**20:,.0f}"
        table.add_row(name, f"{speed(answer):,.0f}", ratio, peak, f"{losses[0]:.4f} {losses[-1]:.4f}")
    Console().print(table)


def main() -> None:
    """Measure, write the results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="Type of the weights.")
    parser.add_argument("--repeats", type=int, default=3, help="Runs of each variant; the best counts.")
    parser.add_argument("--only", nargs="+", choices=["ours", "bare", "trl"], default=["ours", "bare", "trl"])
    parser.add_argument("--envs", type=Path, default=_HERE.parent / ".bench-envs", help="Environments of the peers.")
    args = parser.parse_args()
    ways = run(args)
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "threads": NUM_CORES,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "tokens_per_second": {name: round(speed(answer)) for name, answer in ways.items()},
        "ways": ways,
    }
    if {"ours", "bare"} <= set(ways):
        result["largest_loss_difference_to_bare"] = check_same_losses(ways, args.dtype)
    write_results(f"train_cpu_{args.dtype}", **result)
    show(ways)


if __name__ == "__main__":
    main()
