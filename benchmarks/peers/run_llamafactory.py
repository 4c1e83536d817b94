"""Run LLaMA-Factory's preprocessing: `get_dataset` on the raw rows.

Its multimodal module imports torchaudio, whose PyPI builds need CUDA libraries. Text does not use it, so an empty
module replaces it.
"""

from __future__ import annotations

import importlib.machinery
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

from job import SYSTEM, Answer, Job, run, seconds_of, versions

_NAME = "torchaudio"
sys.modules[_NAME] = types.ModuleType(_NAME)
sys.modules[_NAME].__spec__ = importlib.machinery.ModuleSpec(_NAME, None)

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer  # noqa: E402
from llamafactory.hparams import get_train_args  # noqa: E402
from llamafactory.model import load_tokenizer  # noqa: E402


def measure(job: Job) -> Answer:
    """Preprocess with `workers` processes (0: none), packed (with isolated documents, `neat_packing`) or not."""
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(_settings(job))
    tokenizer = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data_args)
    seconds, module = seconds_of(
        lambda: get_dataset(template, model_args, data_args, training_args, stage=finetuning_args.stage, **tokenizer)
    )
    return {
        "seconds": seconds,
        "tokens": _tokens(module["train_dataset"]),
        "versions": versions("llamafactory", "datasets", "transformers", "tokenizers", "torch"),
    }


def _settings(job: Job) -> dict[str, Any]:
    Path("dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl"}}))
    shutil.copyfile(job["rows"], "rows.jsonl")
    return {
        "model_name_or_path": job["tokenizer"],
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset_dir": ".",
        "dataset": "rows",
        "template": "qwen",
        "default_system": SYSTEM,
        "cutoff_len": job["max_length"],
        "preprocessing_num_workers": job["workers"] or None,
        "packing": job["packing"],
        "neat_packing": job["packing"],
        "output_dir": "llamafactory",
        "report_to": "none",
    }


def _tokens(dataset: Any) -> int:
    # A packed row is padded; its mask numbers the documents from 1 and is 0 on padding.
    masks = dataset.with_format("numpy", columns=["attention_mask"])["attention_mask"]
    return sum(int((mask > 0).sum()) for mask in masks)


if __name__ == "__main__":
    run(measure)
