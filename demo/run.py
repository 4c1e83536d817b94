"""Run the whole workflow on a tiny model: `make demo`.

The stages are: train a tokenizer, pretrain, fine-tune with QLoRA, merge, and ask questions to an untrained model, the
base and the merged model. Each stage prints its command, so that it can be repeated by hand.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs/demo")
BASE, ADAPTER, MERGED = RUNS / "pretrain/model", RUNS / "sft/adapter", RUNS / "merged"

STAGES = {
    "1. train a tokenizer": "demo/train_tokenizer.py demo/corpus.jsonl --vocab_size 1500 "
    "--output_dir runs/demo/tokenizer",
    "2. pretrain a tiny Llama from scratch": "-m sft_lightning fit --config configs/demo_pretrain.yaml",
    "3. teach it to answer with QLoRA": "-m sft_lightning fit --config configs/demo_sft.yaml",
    "4. merge the adapter into the base": f"-m sft_lightning merge --adapter {ADAPTER} --output_dir {MERGED}",
}
NUM_QUESTIONS = 5

# If other work runs on the same cores, OpenMP threads that spin while waiting make training ten times slower.
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}

console = Console(width=None if sys.stdout.isatty() else 140)


def run(title: str, command: str) -> float:
    """Run a stage and return its seconds; exit with its status if it fails.

    Args:
        title: Title of the stage.
        command: Arguments of Python.
    """
    console.rule(f"[bold]{title}")
    console.print(f"$ python {command}", style="cyan", highlight=False)
    started = time.perf_counter()
    status = subprocess.run([sys.executable, *shlex.split(command)], check=False, env=ENVIRONMENT).returncode
    if status:
        sys.exit(status)
    return time.perf_counter() - started


def answer(folder: Path, questions: list[str], *, untrained: bool = False) -> list[str]:
    """Return a model's greedy answers with transformers alone, as a server would.

    Args:
        folder: Folder of the model.
        questions: The questions.
        untrained: Whether to ask a random model of the same shape instead.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MERGED)  # the base has no chat template, so it gets the same one
    if untrained:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    answers = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def compare() -> None:
    """Print the answers of all models to questions of the training data, and to held-out questions."""
    console.rule("[bold]5. ask the models with transformers alone")
    for kind in ("instructions", "held_out"):
        records = json.loads((ROOT / f"demo/{kind}.json").read_text(encoding="utf-8"))
        records = [record for record in records if not record["input"]][:NUM_QUESTIONS]
        questions = [record["instruction"] for record in records]
        heading = "question from the training data" if kind == "instructions" else "held-out question"
        table = Table(heading, "untrained", "base", "merged model", "reference")
        columns = (answer(BASE, questions, untrained=True), answer(BASE, questions), answer(MERGED, questions))
        for question, *answers, record in zip(questions, *columns, records, strict=True):
            table.add_row(question, *(text.replace("\n", " ")[:60] for text in answers), record["output"])
        console.print(table)


def main() -> None:
    """Run all stages, compare the models, and print where the results are."""
    shutil.rmtree(RUNS, ignore_errors=True)  # the trainer refuses to overwrite an earlier run
    seconds = {title: run(title, command) for title, command in STAGES.items()}
    started = time.perf_counter()
    compare()
    seconds["5. ask the models"] = time.perf_counter() - started
    console.rule("[bold]results")
    for what, where in {
        "TensorBoard": f"{RUNS}  (.venv/bin/tensorboard --logdir {RUNS})",
        "samples during training": RUNS / "sft/samples.jsonl",
        "adapter": ADAPTER,
        "merged model": MERGED,
    }.items():
        console.print(f"{what:<24} {where}", highlight=False)
    for title, duration in seconds.items():
        console.print(f"{title:<40} {duration:6.1f} s", highlight=False)
    console.print(f"{'total':<40} {sum(seconds.values()):6.1f} s", highlight=False)


if __name__ == "__main__":
    main()
