"""The gradient of the same global batch, however it is split, beside that of a bare PyTorch loop.

The reference knows nothing of packing, micro-batches or processes: transformers' own attention, a document at a time,
Σ weight · cross entropy over all supervised tokens of the optimizer step, divided by their weight.

As a script it is one of several processes, started by `measure_together`: torchrun … equality_gradients.py JSON
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from family_models import save_family
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.functional import cross_entropy

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.plan.epoch_plan import Topology
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.inspection import base_model
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.spec import TrainingSpec
from sft_lightning.types import IGNORE_INDEX, num_tokens

Gradient = dict[str, torch.Tensor]

Document = tuple[torch.Tensor, ...]
"""Token ids, labels and loss weights, (L,) each."""

TOLERANCE = 1e-6
"""Largest difference of two gradients of a step, relative to the norm of one, float32."""

RECORDS = [
    {
        "instruction": f"What is {i} and {i}?",
        "output": f"{i} and {i} is {2 * i}" + "." * (i % 7 + 1),
        "weight": (1.0, 0.25, 3.0)[i % 3],
    }
    for i in range(21)
]
"""Weights differ; 21 rows are not a whole number of steps, nor of micro-batches of several processes."""

MODES: dict[str, dict[str, Any]] = {"full": {}, "lora": {"adapter": AdapterConfig(r=4, dropout=0.0)}}


@dataclass(frozen=True)
class Split:
    """How the rows of an optimizer step are dealt out."""

    mode: str
    """A key of `MODES`."""

    packing: str
    """`data.packing`."""

    batch_size: int
    """Rows of a micro-batch."""

    accumulate: int
    """Micro-batches of an optimizer step."""

    processes: int
    """Processes (gloo)."""


_STEPS = {"none": [8, 24], "best_fit": [4, 24], "concat": [8, 32]}
"""Rows of an optimizer step: less than an epoch, and all of it: then `none` and `best_fit` have the same gradient."""

_MAX_LENGTH = {"none": 250, "best_fit": 250, "concat": 60}
"""Tokens of a row; `concat` cuts documents at rows so short that some hold a prompt's tokens only, without a loss."""


def all_splits(processes: int) -> list[Split]:
    """Return the ways to deal the steps out, the last of which is never full."""
    return [
        Split(mode, packing, batch_size, rows // batch_size // processes, processes)
        for mode in MODES
        for packing, steps in _STEPS.items()
        for rows in steps
        for batch_size in (1, 2, 4, 8)
        if rows % (batch_size * processes) == 0
    ]


@dataclass(frozen=True)
class Measured:
    """How far the gradients of an epoch are from those of the bare loop."""

    split: Split

    steps: int
    """Optimizer steps of the epoch."""

    difference: float
    """Norm of the difference over all trained parameters, relative to the gradient's; the largest of all steps."""


class KeepGradients(Callback):
    """The gradient that each optimizer step sees."""

    def __init__(self) -> None:
        self.steps: list[Gradient] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move LoRA's B matrices away from zero, where the A matrices have no gradient."""
        generator = torch.Generator().manual_seed(1)
        for name, parameter in pl_module.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(std=0.02, generator=generator)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Keep a copy."""
        named = pl_module.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.requires_grad and p.grad is not None})


def save_model(folder: Path) -> Path:
    """Write a small random model with its tokenizer and records."""
    model = save_family("Llama", folder)
    (model / "records.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    return model


def measure(split: Split, model: Path) -> Measured:
    """Train one epoch without moving a weight, and compare each step's gradient with the bare loop's.

    Args:
        split: How rows are dealt out; where there are several processes, each of them calls this.
        model: Folder that `save_model` wrote.
    """
    torch.manual_seed(0)
    module = CausalLMModule(
        TrainingSpec(
            model_name_or_path=str(model),
            dtype="float32",
            optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0),
            **MODES[split.mode],
        )
    )
    keeper = KeepGradients()
    trainer = Trainer(
        max_epochs=1, accumulate_grad_batches=split.accumulate, callbacks=[keeper], accelerator="cpu",
        devices=split.processes, strategy="ddp" if split.processes > 1 else "auto",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=model,
    )  # fmt: skip
    trainer.fit(module, _data(split.packing, model, split.batch_size))
    rows_per_step = split.batch_size * split.accumulate * split.processes
    documents = _documents(split.packing, model, rows_per_step)
    expected = [_bare_gradient(module, some) for some in documents]
    if len(expected) != len(keeper.steps):
        raise RuntimeError(f"{split}: {len(keeper.steps)} optimizer steps were taken, {len(expected)} planned")
    return Measured(
        split=split,
        steps=len(expected),
        difference=max(relative_difference(one, other) for one, other in zip(keeper.steps, expected, strict=True)),
    )


def _data(packing: str, model: Path, batch_size: int = 1) -> SFTDataModule:
    return SFTDataModule(
        DataSpec(
            sources={"toy": SourceConfig(path=str(model / "records.json"))},
            template="alpaca",
            max_length=_MAX_LENGTH[packing],
            packing=packing,  # type: ignore[arg-type]
            batch_size=batch_size,
            tokenizer_name_or_path=str(model),
            store_dir=str(model / "stores"),
        )
    )


def relative_difference(found: Gradient, expected: Gradient) -> float:
    """Return the norm of the difference, relative to the expected gradient's."""
    if found.keys() != expected.keys():
        raise RuntimeError(f"gradients of other parameters: {sorted(found.keys() ^ expected.keys())}")
    off = sum(float((found[name] - grad).square().sum()) for name, grad in expected.items())
    return math.sqrt(off / sum(float(grad.square().sum()) for grad in expected.values()))


def _documents(packing: str, model: Path, rows_per_step: int) -> list[list[Document]]:
    """Return the documents of each optimizer step of the epoch."""
    data = _data(packing, model)
    data.topology = Topology(batch_size=1, accumulate=rows_per_step)
    data.setup("fit")
    steps: list[list[Document]] = []
    for index, batch in enumerate(data.train_dataloader()):
        if index % rows_per_step == 0:
            steps.append([])
        lengths = [num_tokens(length) for length in batch["document_lengths"][0]]
        columns = [batch[key][0].split(lengths) for key in ("input_ids", "labels", "loss_weights")]
        steps[-1] += list(zip(*columns, strict=True))
    return steps


def _bare_gradient(module: CausalLMModule, documents: Sequence[Document]) -> Gradient:
    """Return the gradient of the mean loss per supervised token, by transformers and PyTorch alone, in float64."""
    bare = copy.deepcopy(module.language_model).double()
    base_model(bare).set_attn_implementation("sdpa")
    bare.zero_grad()
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for ids, labels, weights in documents:
        supervised = labels[1:] != IGNORE_INDEX
        logits = bare(input_ids=ids[None], use_cache=False).logits[0, :-1][supervised]
        losses = cross_entropy(logits, labels[1:][supervised], reduction="none")
        total = total + (losses * weights[1:][supervised]).sum()
        weight += float(weights[1:][supervised].double().sum())
    (total / weight).backward()
    return {f"model.{name}": p.grad for name, p in bare.named_parameters() if p.requires_grad and p.grad is not None}


def measure_together(splits: Sequence[Split], model: Path) -> list[Measured]:
    """Measure splits over the same number of processes, which are started for them.

    Args:
        splits: All of them.
        model: Folder that `save_model` wrote.
    """
    out = model / "measured.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={splits[0].processes}"),
        *(__file__, json.dumps({"model": str(model), "out": str(out), "splits": [asdict(split) for split in splits]})),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"processes that were to measure gradients failed:\n{done.stderr[-3000:]}")
    found = json.loads(out.read_text(encoding="utf-8"))
    return [Measured(**{**each, "split": Split(**each["split"])}) for each in found]


def _measure_here(options: dict[str, Any]) -> None:
    found = [measure(Split(**split), Path(options["model"])) for split in options["splits"]]
    if int(os.environ["RANK"]) == 0:
        text = json.dumps([asdict(measured) for measured in found])
        Path(options["out"]).write_text(text, encoding="utf-8")


def table(measured: Sequence[Measured]) -> str:
    """Return the differences as a Markdown table."""
    lines = [
        "| mode | packing | rows per micro-batch | accumulation | processes | optimizer steps | relative difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in measured:
        s = each.split
        lines.append(
            f"| {s.mode} | {s.packing} | {s.batch_size} | {s.accumulate} | {s.processes} | {each.steps} | "
            f"{each.difference:.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    _measure_here(json.loads(sys.argv[1]))
