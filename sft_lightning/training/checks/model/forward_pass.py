"""The run's own forward pass on documents of its first batch: alone and beside others, against another way to the loss.

Batches are made by the run's `collate`, in its layout and batch size, and go through `module.forward` under its
precision, attention and adapter, in evaluation mode. The loss that they are compared with uses none of this: token ids,
the model's own logits, and `F.cross_entropy`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from sft_lightning.batch import RowSums, batch_to
from sft_lightning.checks import Check
from sft_lightning.compat.bitsandbytes import without_int8_outliers
from sft_lightning.data.batches.collate import collate
from sft_lightning.data.batches.loader import Document
from sft_lightning.data.pairs.store import PairExample
from sft_lightning.models.inspection import evaluating
from sft_lightning.training.checks.hooks import RunCheck
from sft_lightning.types import IGNORE_INDEX, SharedPrompt, TokenizedExample

if TYPE_CHECKING:
    from sft_lightning.training.module import CausalLMModule

_LENGTH = 128
"""Most tokens of the document that is measured, and of each one before it."""

_MEASURED = 4
"""Tokens at the beginning of a document whose loss shows whether it sees the one before: they see little else."""

_MAX_ROWS = 3
"""Rows of the largest batch: some kernels keep documents apart in a batch of one row only."""

_ROUNDINGS = 4
"""By how many roundings of its numbers, relative to their size, a loss may differ."""


class Measured(NamedTuple):
    """Losses of one document, Σ weight · cross entropy in nats."""

    loss: float
    """By the run's forward pass."""

    expected: float
    """By `F.cross_entropy` on the model's own logits."""

    weight: float
    """Σ weight."""

    rounding: float
    """Relative error of a number of the forward pass."""

    def check(self, name: str, what: str) -> Check:
        """Return whether the two agree.

        Args:
            name: Name of the check.
            what: What the losses are of.
        """
        if not math.isfinite(self.expected):
            return Check(name, None, f"{what}: the model's loss is {self.expected}")
        scale = abs(self.expected) + self.weight  # so that a loss near 0 has a bound
        off, bound = abs(self.loss - self.expected) / scale, max(1e-4, _ROUNDINGS * self.rounding)
        figure = f"{what}: {self.loss:.4f} by the run, {self.expected:.4f} by F.cross_entropy; difference {off:.1e}"
        return Check(name, off <= bound, figure, f"at most {bound:.1e}")


class ForwardPass(RunCheck):
    """Compare losses on documents of the first batch, before it is trained on."""

    def __init__(self) -> None:
        self._done = False

    def on_train_batch_start(self, module: CausalLMModule, batch: Any, index: int) -> None:
        """Compare the loss of a document, and then its loss beside others if rows hold several."""
        if self._done:
            return
        self._done = True
        documents = real_documents(batch)
        module.checks.run(lambda: check_loss(module, documents[0]))
        if module.data.packs:
            module.checks.run(lambda: check_isolation(module, documents))
        else:
            module.checks.note(Check("isolation", None, "no row has more than one document"))


def real_documents(batch: Any) -> list[TokenizedExample]:
    """Return a document of a batch that has supervised tokens, then another one; short parts of them.

    A batch without documents, which a process may get at the end of an epoch, gives its padding: all processes of
    sharded weights have to run the same forward passes.

    Args:
        batch: The batch, on any device.
    """
    ids, labels = (batch[name].cpu().numpy() for name in ("input_ids", "labels"))
    weights = batch["loss_weights"].float().cpu().numpy()
    found: list[TokenizedExample] = []
    for row, lengths in enumerate(batch["document_lengths"]):
        start = 0
        for length in lengths:
            end = start + (length.common + length.first if isinstance(length, SharedPrompt) else length)
            labelled = np.flatnonzero(labels[row, start:end] != IGNORE_INDEX)
            if len(labelled):
                first = start + max(0, int(labelled[0]) - _LENGTH // 2)
                part = slice(first, min(first + _LENGTH, end))
                found.append(TokenizedExample(ids[row, part].astype(np.int32), weights[row, part].copy()))
            start += length.num_tokens if isinstance(length, SharedPrompt) else length
    if not found:
        found = [TokenizedExample(np.repeat(ids[0, :1], 2).astype(np.int32), np.ones(2, np.float32))]
    if len(found) == 1:
        found.append(TokenizedExample(found[0].input_ids[::-1].copy(), found[0].loss_weights))
    return [found[0], found[-1]]


@torch.no_grad()
def check_loss(module: CausalLMModule, document: TokenizedExample) -> Check:
    """Check the loss of a document alone.

    Args:
        module: The module of the run.
        document: The document.
    """
    with _as_evaluated(module):
        loss = _loss(module, [[document]])
        expected = independent_loss(module, document)
    weight = float(document.loss_weights[1:].sum())
    measured = Measured(loss, expected, weight, rounding_of(module))
    return measured.check("loss", f"a document of {len(document.input_ids)} tokens")


@torch.no_grad()
def check_isolation(module: CausalLMModule, documents: Sequence[TokenizedExample]) -> Check:
    """Check the loss of a document's first tokens behind other documents, in batches of one row and of several.

    Args:
        module: The module of the run.
        documents: The document, and another one.
    """
    spec = module.data.spec
    ids = documents[0].input_ids[: max(2, spec.max_length // 2)]
    weights = np.zeros(len(ids), np.float32)
    weights[1 : 1 + _MEASURED] = 1.0
    document = TokenizedExample(ids, weights)
    before = documents[1].input_ids[: max(1, spec.max_length - len(ids))]
    others = [before, np.roll(before, len(before) // 2)[::-1].copy()]
    counts = sorted({1, min(spec.batch_size, _MAX_ROWS)})
    with _as_evaluated(module):
        expected = independent_loss(module, document)
        found = [
            (n, _loss(module, [_row(other, document, r) for r in range(n)]) / n) for n in counts for other in others
        ]
    rows, loss = max(found, key=lambda each: (math.isnan(each[1]), abs(each[1] - expected)))
    measured = Measured(loss, expected, float(weights.sum()), rounding_of(module))
    return measured.check("isolation", f"a document's first tokens behind another, {rows} rows")


def _row(before: Any, document: TokenizedExample, row: int) -> list[TokenizedExample]:
    """Return a row with an unsupervised document before the measured one; it is shorter in each further row."""
    ids = before[: max(1, len(before) // (row + 1))]
    return [TokenizedExample(ids, np.zeros(len(ids), np.float32)), document]


def _loss(module: CausalLMModule, rows: Sequence[Sequence[TokenizedExample]]) -> float:
    """Return the loss of rows by the run's collate and forward pass; a row of two documents may be a pair."""
    data = module.data
    if data.kind.documents_per_example == 1 or len(rows[0]) == 1:
        documents = [[Document(0, each, RowSums()) for each in row] for row in rows]
    else:
        documents = [[Document(0, _pair(*row), RowSums())] for row in rows]
    if data.kind.documents_per_example > 1 and len(rows[0]) == 1:
        batch = collate(rows, pad_token_id=data.pad_token_id, denominator=1.0)
    else:
        batch = data.kind.collate(documents, layout=data.layout, pad_token_id=data.pad_token_id, denominator=1.0)
    return float(module(batch_to(batch, module.device)).loss)


def _pair(chosen: TokenizedExample, rejected: TokenizedExample) -> PairExample:
    both = [np.concatenate(parts) for parts in zip(vars(chosen).values(), vars(rejected).values(), strict=True)]
    return PairExample(both[0], both[1], num_chosen=len(chosen.input_ids), weight=1.0)


def independent_loss(module: CausalLMModule, document: TokenizedExample) -> float:
    """Return the loss of a document from the model's own logits, in nats.

    Args:
        module: The module of the run, in evaluation mode.
        document: The document.
    """
    ids = torch.from_numpy(document.input_ids.astype(np.int64)).to(module.device)
    weights = torch.from_numpy(document.loss_weights).to(module.device)
    logits = module.language_model(input_ids=ids[None], use_cache=False).logits[0, -len(ids) :].float()
    return float((F.cross_entropy(logits[:-1], ids[1:], reduction="none") * weights[1:]).sum())


@contextmanager
def _as_evaluated(module: CausalLMModule) -> Iterator[None]:
    """Evaluation mode, in the precision of the run."""
    precision = module.trainer.precision_plugin.forward_context()
    with evaluating(module.language_model), precision, without_int8_outliers(module.language_model):
        yield


def rounding_of(module: CausalLMModule) -> float:
    """Return the relative error of a number in a forward pass: that of the coarsest type that the model computes in.

    Args:
        module: The module of the run.
    """
    known = (torch.float16, torch.bfloat16, torch.float32)
    types = {parameter.dtype for parameter in module.language_model.parameters() if parameter.dtype in known}
    precision, quantization = str(module.trainer.precision), module.spec.quantization
    types |= {torch.bfloat16} if precision.startswith("bf16") else set()
    types |= {torch.float16} if precision.startswith("16") else set()
    if quantization is not None:
        types.add(getattr(torch, quantization.compute_dtype or module.spec.dtype))
    coarsest = max(torch.finfo(dtype).eps for dtype in types)
    if module.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        coarsest = max(coarsest, 2.0**-10)  # TF32
    return coarsest
