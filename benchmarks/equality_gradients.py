"""Compare the gradient of a global batch, split in different ways, with that of a bare PyTorch loop.

The loop has no packing, micro-batches or processes: it runs transformers' own attention on one document at a time and
divides Σ weight · cross entropy over all supervised tokens of the optimizer step by their weight.

This file is also the script that `measure_together` starts in several processes: torchrun … equality_gradients.py JSON
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from family_models import save_family
from lightning.pytorch import Callback, LightningModule, Trainer
from markdown_table import markdown_table
from tiny_runs import cpu_trainer, run_in_processes
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
"""Largest difference of two float32 gradients of a step, relative to the norm of one."""

RECORDS = [
    {
        "instruction": f"What is {i} and {i}?",
        "output": f"{i} and {i} is {2 * i}" + "." * (i % 7 + 1),
        "weight": (1.0, 0.25, 3.0)[i % 3],
    }
    for i in range(21)
]
"""Records with different weights. 21 rows are not divisible by the steps, nor by the micro-batches of the processes."""

MODES: dict[str, dict[str, Any]] = {"full": {}, "lora": {"adapter": AdapterConfig(r=4, dropout=0.0)}}


@dataclass(frozen=True)
class Split:
    """How the rows of an optimizer step are split."""

    mode: str
    """A key of `MODES`."""

    packing: str
    """`data.packing`."""

    batch_size: int
    """Rows per micro-batch."""

    accumulate: int
    """Micro-batches per optimizer step and process."""

    processes: int
    """Number of processes (gloo)."""


_STEPS = {"none": [8, 24], "best_fit": [4, 24], "concat": [8, 32]}
"""Rows per optimizer step: a part of the epoch, or all of it, where `none` and `best_fit` have the same gradient."""

_MAX_LENGTH = {"none": 250, "best_fit": 250, "concat": 60}
"""Tokens per row. The rows of `concat` are so short that some contain only prompt tokens, which are not supervised."""


def all_splits(processes: int) -> list[Split]:
    """Return all splits over a number of processes; the last step of an epoch is always incomplete."""
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
    """Difference between the gradients of an epoch and those of the bare loop."""

    split: Split
    """How the rows were split."""

    steps: int
    """Optimizer steps per epoch."""

    difference: float
    """Norm of the difference over all trained parameters, relative to the gradient's norm; the largest of all steps."""


class KeepGradients(Callback):
    """Keeps the gradient of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[Gradient] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make LoRA's B matrices nonzero, because with zero B the A matrices have no gradient."""
        generator = torch.Generator().manual_seed(1)
        for name, parameter in pl_module.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(std=0.02, generator=generator)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Keep a copy of the gradient."""
        named = pl_module.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.requires_grad and p.grad is not None})


def save_model(folder: Path) -> Path:
    """Write a small random model with its tokenizer and records."""
    model = save_family("Llama", folder)
    (model / "records.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    return model


def measure(split: Split, model: Path) -> Measured:
    """Run one epoch with a learning rate of 0, and compare each step's gradient with that of the bare loop.

    Args:
        split: How the rows are split; each of its processes calls this.
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
    trainer = cpu_trainer(
        model, split.processes, max_epochs=1, accumulate_grad_batches=split.accumulate, callbacks=[keeper]
    )
    trainer.fit(module, _data(split.packing, model, split.batch_size))
    rows_per_step = split.batch_size * split.accumulate * split.processes
    documents = _documents(split.packing, model, rows_per_step)
    expected = [_bare_gradient(module, some) for some in documents]
    if len(expected) != len(keeper.steps):
        raise RuntimeError(f"{split}: {len(keeper.steps)} optimizer steps were run, but {len(expected)} were planned")
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
    """Return the norm of the difference, relative to the norm of the expected gradient.

    Args:
        found: The gradient of each parameter.
        expected: The same of the bare loop.

    Raises:
        RuntimeError: If they are gradients of different parameters.
    """
    if found.keys() != expected.keys():
        raise RuntimeError(f"gradients of different parameters: {sorted(found.keys() ^ expected.keys())}")
    squared = sum(float((found[name] - grad).square().sum()) for name, grad in expected.items())
    return math.sqrt(squared / sum(float(grad.square().sum()) for grad in expected.values()))


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
    """Return the float64 gradient of the mean loss per supervised token, with transformers and PyTorch alone."""
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
    """Measure splits that have the same number of processes, in processes started for them.

    Args:
        splits: The splits.
        model: Folder that `save_model` wrote.
    """
    out = model / "measured.json"
    work = {"model": str(model), "out": str(out), "splits": [asdict(split) for split in splits]}
    run_in_processes(__file__, work, splits[0].processes)
    found = json.loads(out.read_text(encoding="utf-8"))
    return [Measured(**{**each, "split": Split(**each["split"])}) for each in found]


def _measure_here(options: dict[str, Any]) -> None:
    found = [measure(Split(**split), Path(options["model"])) for split in options["splits"]]
    if int(os.environ["RANK"]) == 0:
        text = json.dumps([asdict(measured) for measured in found])
        Path(options["out"]).write_text(text, encoding="utf-8")


def table(measured: Sequence[Measured]) -> str:
    """Return the differences as a Markdown table."""
    head = (
        "mode", "packing", "rows per micro-batch", "accumulation", "processes", "optimizer steps",
        "relative difference",
    )  # fmt: skip
    rows = [[*map(str, (*astuple(each.split), each.steps)), f"{each.difference:.1e}"] for each in measured]
    return markdown_table(head, rows)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    _measure_here(json.loads(sys.argv[1]))
