"""Compare the memory that `plan` predicts with measured runs, for each strategy with two processes on the CPU.

    python benchmarks/plan_memory.py [--only ddp fsdp2 deepspeed_stage_1 …] [--modes full lora]

The runs are those of `scaling.py`: a Llama of 80 M parameters in float32, two rows of 512 tokens per process, AdamW;
full fine-tuning and LoRA of rank 64. The measured peak is the tensors that are alive before a step, and the most that
torch's allocator adds during the step (`torch.profiler`). Everything is in MiB. Memory that DeepSpeed allocates and
never uses counts in both, as it does on a GPU.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from markdown_table import markdown_row
from scaling import THEORY_SENT, run, write_inputs, write_run

from sft_lightning.cli.commands.plan import plan_inputs
from sft_lightning.estimation.report import PARTS, plan_memory

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from processes import empty_folder, use_two_cores
from results import write_results

MIB = 2**20
MODES: dict[str, dict[str, Any]] = {"full": {}, "lora": {"adapter": {"r": 64, "dropout": 0.0}}}
HEAD = ["mode", "strategy", "planned", "measured", "planned / measured", *PARTS, "held, measured"]


def planned(file: Path) -> dict[str, float]:
    """Return the memory that `plan` predicts for a configuration, in bytes by part."""
    estimator, setup = plan_memory(plan_inputs(["--config", str(file)]))
    return dict(vars(estimator.memory(setup)))


def main() -> None:
    """Measure, print the table row by row as Markdown, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(THEORY_SENT), default=list(THEORY_SENT), help="Strategies.")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="Modes of training.")
    args = parser.parse_args()
    use_two_cores()
    found: list[dict[str, Any]] = []
    print(f"{markdown_row(HEAD)}\n{markdown_row(['---'] * len(HEAD))}", flush=True)
    for mode in args.modes:
        with empty_folder() as folder:
            write_inputs(folder)
            for strategy in args.only:
                answer = run(folder, strategy, 2, MODES[mode])
                plan = planned(write_run(folder, strategy, 2, MODES[mode]))
                found.append({"mode": mode, "strategy": strategy, "planned": plan, **answer})
                print(markdown_row(row(found[-1])), flush=True)
    write_results("plan_memory_cpu", python=platform.python_version(), torch=torch.__version__, ways=found)


def row(way: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    total = sum(way["planned"].values())
    return [
        way["mode"], way["strategy"], f"{total / MIB:.0f}", f"{way['bytes_peak'] / MIB:.0f}",
        f"{total / way['bytes_peak']:.2f}", *(f"{way['planned'][part] / MIB:.0f}" for part in PARTS),
        f"{way['bytes_held'] / MIB:.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
