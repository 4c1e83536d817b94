"""Train with a bare PyTorch loop of a dozen lines, on our rows, with our attention and our loss."""

from __future__ import annotations

import torch
from job import Answer, Job, peak_memory, run, versions
from step_times import StepTimes
from transformers import AutoModelForCausalLM

from sft_lightning.cli.app import SFTCommandLine
from sft_lightning.cli.commands import prepare
from sft_lightning.cli.quiet import quiet_libraries
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.training.losses import find_targets, linear_cross_entropy


def measure(job: Job) -> Answer:
    """Train on the first rows of the job's configuration."""
    torch.set_num_threads(job["threads"])
    times = StepTimes(peak_memory())
    quiet_libraries()
    data = SFTCommandLine("prepare", ["--config", job["prepare"]], prepare.add_options).data
    data.setup("fit")
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"]), attn_implementation=PACKED
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], weight_decay=0.0, fused=True)
    times.start()
    for _, batch in zip(range(job["steps"]), data.train_dataloader(), strict=False):
        hidden = model.model(
            batch["input_ids"], position_ids=batch["position_ids"], document_lengths=batch["document_lengths"],
            use_cache=False,
        ).last_hidden_state  # fmt: skip
        targets = find_targets(batch)
        sums = linear_cross_entropy(hidden.flatten(0, 1)[targets.positions], model.lm_head.weight, None, targets)
        loss = sums.loss / batch["denominator"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.step(int(batch["num_tokens"]), float(loss))
    return {**times.answer(), "versions": versions("torch", "transformers")}


if __name__ == "__main__":
    run(measure)
