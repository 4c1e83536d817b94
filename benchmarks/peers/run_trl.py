"""Run the data preparation of TRL's `SFTTrainer`: `load_dataset` and its `_prepare_dataset`.

The rows are converted to its format, messages, before the timing starts. The trainer needs a model: a Qwen2 of one tiny
layer, which never runs.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from datasets import load_dataset
from job import SYSTEM, Answer, Job, question, records, run, seconds_of, versions
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer


class TimedTrainer(SFTTrainer):  # type: ignore[misc]
    """Times the preparation of the dataset."""

    seconds = 0.0

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        prepared = super()._prepare_dataset(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return prepared


def measure(job: Job) -> Answer:
    """Prepare with `workers` processes (0: none), packed or not, and `loss` on `completion` or `assistant` tokens."""
    file = Path("trl.jsonl")
    with file.open("w", encoding="utf-8") as out:
        for record in records(job):
            out.write(json.dumps(_as_trl(record, job["loss"])) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    config = SFTConfig(
        output_dir="trl",
        max_length=job["max_length"],
        packing=job["packing"],
        completion_only_loss=True if job["loss"] == "completion" else None,
        assistant_only_loss=job["loss"] == "assistant",
        dataset_num_proc=job["workers"] or None,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    seconds, dataset = seconds_of(lambda: load_dataset("json", data_files=str(file), split="train"))
    trainer = TimedTrainer(model=_model(tokenizer), args=config, train_dataset=dataset, processing_class=tokenizer)
    return {
        "seconds": seconds + trainer.seconds,
        "tokens": _tokens(trainer.train_dataset),
        "versions": versions("trl", "datasets", "transformers", "tokenizers", "torch"),
    }


def _as_trl(record: dict[str, str], loss: str) -> dict[str, Any]:
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question(record)}]
    completion = [{"role": "assistant", "content": record["output"]}]
    return {"messages": prompt + completion} if loss == "assistant" else {"prompt": prompt, "completion": completion}


def _model(tokenizer: Any) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def _tokens(dataset: Any) -> int:
    return sum(map(len, dataset.with_format("numpy", columns=["input_ids"])["input_ids"]))


if __name__ == "__main__":
    run(measure)
