"""Train a cell with our command line as users do, or with the same parts in a bare loop."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Callback, Trainer

import callbacks
from benchmarks.gpu.cells import Cell
from benchmarks.gpu.clock import Answer, StepClock
from sft_lightning.cli.app import SFTCommandLine
from sft_lightning.cli.commands import prepare
from sft_lightning.estimation.speed import mean_document_length, training_operations
from sft_lightning.models.assembly import assemble_model
from sft_lightning.training import startup
from sft_lightning.training.optim import build_optimizer, parameter_groups


class Clock(Callback):
    """Times the steps of `fit`; called after the trainer's own callbacks."""

    clock: StepClock
    operations_per_token: float

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            documents = trainer.datamodule.plan(0).documents
            length = mean_document_length(documents[:, 2] - documents[:, 1])
            operations = training_operations(pl_module.language_model)
            type(self).operations_per_token = operations.count(num_tokens=1, num_supervised=1, document_length=length)
            self.clock.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        norm = trainer.callback_metrics.get("train/grad_norm")
        self.clock.step(int(batch["num_tokens"]), outputs["loss"], norm)


class NoAdapterExport(callbacks.AdapterExport):
    """Writes nothing: a benchmark needs no export."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    on_train_end = setup


class NoModelExport(callbacks.ModelExport):
    """Writes nothing: the weights of a cell are random."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


@contextlib.contextmanager
def _patched(cell: Cell) -> Iterator[None]:
    """Turn off what no key turns off."""
    if cell.patch == "unfused_lora":
        with mock.patch("sft_lightning.models.adapters.wrapping.fuse_lora"):
            yield
    else:
        yield


def fit(cell: Cell, config: Path, clock: StepClock) -> Answer:
    """Train with `python -m sft_lightning fit`, all default callbacks but exports and samples.

    Args:
        cell: The cell.
        config: Its configuration.
        clock: Times the steps.
    """
    Clock.clock = clock
    with _patched(cell), contextlib.redirect_stdout(io.StringIO()):
        SFTCommandLine("fit", ["--config", str(config)])
    return {**clock.answer(), "flops_per_token": Clock.operations_per_token}


def bare(cell: Cell, config: Path, clock: StepClock) -> Answer:
    """Train with a loop of a dozen lines around our data, model, loss and optimizer, without Lightning.

    Args:
        cell: The cell.
        config: Its configuration.
        clock: Times the steps.
    """
    command = SFTCommandLine("prepare", ["--config", str(config)], prepare.add_options)
    data, module = command.data, command.module
    data.setup("fit")
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="gpu" if clock.device.type == "cuda" else "cpu", devices=1, precision="bf16-mixed", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.datamodule = data  # it decides how the layers run, and runs nothing
    module.trainer = trainer
    module.model = assemble_model(command.spec, data.tokenizer, log=print).to(clock.device)
    module.to(clock.device)
    startup.set_up_layers(module)
    optimizer: Any = build_optimizer(command.spec.optimizer, parameter_groups(module.model.named_parameters()))
    trained = [parameter for parameter in module.model.parameters() if parameter.requires_grad]
    clock.start()
    for _, batch in zip(range(clock.total), data.train_dataloader(), strict=False):
        moved: Any = data.transfer_batch_to_device(batch, clock.device, 0)
        with trainer.precision_plugin.forward_context():
            loss = module(moved).loss / moved["denominator"]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(int(moved["num_tokens"]), loss, norm)
    return clock.answer()
