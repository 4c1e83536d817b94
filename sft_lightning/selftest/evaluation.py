"""Evaluate a model on a few rows: logits and loss, in evaluation mode and without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from sft_lightning.batch import Batch, batch_to
from sft_lightning.compat.bitsandbytes import without_int8_outliers
from sft_lightning.data.batches.collate import collate
from sft_lightning.data.batches.loader import documents_of
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.pairs.store import PairExample
from sft_lightning.models.inspection import evaluating
from sft_lightning.selftest.short_runs import Run
from sft_lightning.training.forward import decoder_inputs
from sft_lightning.training.losses import LossSums, cross_entropy_sums, find_targets
from sft_lightning.types import TokenizedExample

Precision = Callable[[], AbstractContextManager[Any]]
"""Makes the context of a forward pass, such as autocast."""


class Evaluation(NamedTuple):
    """Logits and loss of a model on a batch."""

    logits: torch.Tensor
    """(N, V) float32 logits at the N positions that predict supervised tokens, on the CPU."""

    loss: float
    """Mean loss over the supervised tokens, in nats."""


def documents_of_row(data: SFTDataModule, row: int) -> list[TokenizedExample]:
    """Return the documents of a row of the first epoch; a preference pair is two documents.

    Args:
        data: The data of a run, set up.
        row: Number of the row.
    """
    [documents] = documents_of(data.plan(0), [row], data.blend.examples)
    tokens = [document.tokens for document in documents]
    return [half for each in tokens for half in (each.halves() if isinstance(each, PairExample) else [each])]


def batch_of(rows: Sequence[Sequence[TokenizedExample]], data: SFTDataModule, device: torch.device) -> Batch:
    """Return rows as a batch on a device.

    Args:
        rows: The documents of each row.
        data: The data of the run, for its padding token.
        device: Where to put the tensors.
    """
    return batch_to(collate(rows, pad_token_id=data.stop_token_id, denominator=1.0), device)


@torch.no_grad()
def loss_sums(run: Run, rows: Sequence[Sequence[TokenizedExample]]) -> LossSums:
    """Return the loss sums of rows as training computes them, but in evaluation mode.

    Args:
        run: The run whose model to evaluate.
        rows: The documents of each row.
    """
    module = run.module.to(run.device)
    precision = run.trainer.precision_plugin.forward_context()
    with evaluating(module), precision, without_int8_outliers(module.language_model):
        sums: LossSums = module(batch_of(rows, run.data, run.device))
    return sums


@torch.no_grad()
def evaluate(model: torch.nn.Module, batch: Batch, precision: Precision) -> Evaluation:
    """Return a model's logits and loss on a batch; the model stays in evaluation mode.

    Args:
        model: A causal language model with its adapter, on the device of the batch.
        batch: (B, S) rows.
        precision: Makes the context of the forward pass.
    """
    model.eval()
    targets = find_targets(batch)
    with precision():
        out = model(**decoder_inputs(batch))
    logits = out.logits.flatten(0, 1)[targets.positions].float()
    sums = cross_entropy_sums(logits, targets)
    return Evaluation(logits.cpu(), float(sums.loss / sums.weight))
