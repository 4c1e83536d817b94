"""Train a real pretrained model on real text and real instructions in every mode; report losses, speed and exports.

    python benchmarks/real_runs.py [--modes full lora dora qlora int8] [--steps 200]

Each row runs `fit` from a configuration, then `merge`, as a user does. stories260K (260 thousand parameters) is trained
in float32 on WikiText-2's validation text (`task: pretrain`, concatenated), with a story for validation, and on 1100
instructions (Alpaca's template), of which a twentieth is held out. Losses are validation losses in nats per token.
The environment variable SFT_REAL_DATA names the folder with the model and the data.
Results are written to `benchmarks/results/` with hardware and versions.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE / "peers"))

from job import versions  # noqa: E402
from processes import empty_folder  # noqa: E402
from real_data import REAL_DATA, require_real_data  # noqa: E402
from results import write_results  # noqa: E402

ADAPTER = {"r": 8, "alpha": 16}
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": ADAPTER},
    "dora": {"adapter": {**ADAPTER, "use_dora": True}},
    "qlora": {"adapter": ADAPTER, "quantization": {"bits": 4}},
    "int8": {"adapter": ADAPTER, "quantization": {"bits": 8}},
}
TASKS: dict[str, dict[str, Any]] = {
    "text": {
        "task": "pretrain",
        "data": {"sources": {"wikitext": {"path": "raw/wikitext2_valid.txt"}}, "packing": "concat"},
    },
    "instructions": {
        "task": "sft",
        "data": {
            "sources": {"rasbt": {"path": "instruct/rasbt_instruction_data.json"}},
            "template": "alpaca",
            "val_fraction": 0.05,
        },
    },
}
_PRINTED = {
    "exported logits differ by": r"its logits differ from the live ones by ([\d.e+-]+)",
    "merged logits differ by": r"its logits differ from the adapted model's by at most ([\d.e+-]+)",
    "KL original": r"merged into the original base\) .*: ([\d.e+-]+) nats",
    "KL dequantized": r"merged into the dequantized base\) .*: ([\d.e+-]+) nats",
}
"""Figures that `fit` and `merge` print; a missing one is shown as –."""


def configuration(task: str, mode: str, folder: Path, steps: int) -> dict[str, Any]:
    """Return the configuration of a run.

    Args:
        task: A key of `TASKS`.
        mode: A key of `MODES`.
        folder: Folder for the run's files.
        steps: Optimizer steps.
    """
    wanted = TASKS[task]
    data = {**wanted["data"], "max_length": 512, "batch_size": 2, "store_dir": str(folder / "stores")}
    data["sources"] = {
        name: {**source, "path": str(REAL_DATA / source["path"])} for name, source in data["sources"].items()
    }
    if task == "text":  # the training text is one document, so validation needs another
        data["val_sources"] = {"story": {"path": str(REAL_DATA / "raw" / "the_verdict.txt")}}
    lr = 1e-3 if mode == "full" else 3e-3
    return {
        "task": wanted["task"],
        "model": {
            "model_name_or_path": str(REAL_DATA / "model" / "stories260K"),
            "dtype": "float32",
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr, "fused": True}},
            "lr_scheduler": {"name": "cosine", "warmup_ratio": 0.03},
            **MODES[mode],
        },
        "data": data,
        "trainer": {
            "max_steps": steps,
            "max_epochs": -1,
            "check_val_every_n_epoch": None,
            "val_check_interval": steps,
            "default_root_dir": str(folder / "run"),
            "callbacks": [{"class_path": "callbacks.EvaluateFirst"}],
        },
    }


def command(*args: str) -> str:
    """Run one of our commands, and return its output.

    Raises:
        SystemExit: If it fails.
    """
    done = subprocess.run([sys.executable, "-m", "sft_lightning", *args], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(args)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout + done.stderr


def run(task: str, mode: str, steps: int) -> dict[str, Any]:
    """Train, export and merge; return the figures.

    Args:
        task: A key of `TASKS`.
        mode: A key of `MODES`.
        steps: Optimizer steps.

    Raises:
        SystemExit: If a command fails, or if `fit` does not print its figures.
    """
    with empty_folder() as folder:
        file = folder / "config.yaml"
        file.write_text(json.dumps(configuration(task, mode, folder, steps)))
        output = command("fit", "--config", str(file))
        if mode != "full":
            output += command(
                "merge", "--adapter", str(folder / "run" / "adapter"), "--output_dir", str(folder / "out")
            )
        events = EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0})
        events.Reload()
        losses = [event.value for event in events.Scalars("val/loss")]
        trained = re.search(r"trained (\d+) optimizer steps: .* · ([\d,]+) tokens/s", output)
        if trained is None:
            raise SystemExit(f"fit does not print what it trained:\n{output[-3000:]}")
        found = {name: re.search(pattern, output) for name, pattern in _PRINTED.items()}
        return {
            "task": task,
            "mode": mode,
            "steps": int(trained[1]),
            "loss before": losses[0],
            "loss after": losses[-1],
            "tokens/s": int(trained[2].replace(",", "")),
            **{name: float(match[1]) for name, match in found.items() if match},
        }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names)
    for row in rows:
        table.add_row(*(_short(row.get(name)) for name in names))
    Console(width=160).print(table)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if value >= 0.1 else f"{value:.1e}"
    return "–" if value is None else str(value)


def main() -> None:
    """Run all tasks and modes, print the table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="Modes of training.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="Data to train on.")
    parser.add_argument("--steps", type=int, default=200, help="Optimizer steps per run.")
    args = parser.parse_args()
    require_real_data("model/stories260K")
    rows = [run(task, mode, args.steps) for task in args.tasks for mode in args.modes]
    show(rows)
    used = versions("torch", "transformers", "peft", "bitsandbytes", "lightning")
    write_results("real_runs_cpu", versions=used, runs=rows)


if __name__ == "__main__":
    main()
