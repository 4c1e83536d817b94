"""Train with TRL's `SFTTrainer` on the same texts, model and optimizer, without gradient checkpointing.

Either packed to the same length (`bfd`), one row per step; or unpacked, `batch_size` texts per step, as by default.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import load_dataset
from job import Answer, Job, peak_memory, run, versions
from step_times import StepTimes
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Watch(TrainerCallback):  # type: ignore[misc]
    """Times the steps."""

    def __init__(self, times: StepTimes) -> None:
        self.times = times
        self.tokens = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.times.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.step(self.tokens)
        self.tokens = 0


class CountingTrainer(SFTTrainer):  # type: ignore[misc]
    """Counts the tokens of each step; those of padding are none."""

    watch: Watch

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        self.watch.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        return super().training_step(model, inputs, *args, **kwargs)


def measure(job: Job) -> Answer:
    """Train for `steps` steps, packed or with rows of `batch_size` texts."""
    torch.set_num_threads(job["threads"])
    times = StepTimes(peak_memory())
    packs = job["packing"]
    config = SFTConfig(
        output_dir="trl",
        max_length=job["max_length"],
        packing=packs,
        per_device_train_batch_size=1 if packs else job["batch_size"],
        gradient_checkpointing=False,
        max_steps=job["steps"],
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    CountingTrainer.watch = Watch(times)
    trainer = CountingTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])),
        args=config,
        train_dataset=load_dataset("json", data_files=job["rows"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[CountingTrainer.watch],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {**times.answer(), "losses": losses, "versions": versions("trl", "torch", "transformers")}


if __name__ == "__main__":
    run(measure)
