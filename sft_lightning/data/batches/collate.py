"""Rows of examples → Batch: the only place that makes tensors of shape (B, S)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sft_lightning.batch import Batch, DocumentLengths, SupervisedPositions
from sft_lightning.types import IGNORE_INDEX, DocumentLength, TokenizedExample


def collate(
    rows: Sequence[Sequence[TokenizedExample]],
    *,
    pad_token_id: int,
    denominator: float,
    shape: tuple[int, int] | None = None,
) -> Batch:
    """Return rows of documents as one padded micro-batch.

    Padding is known by its position, never by its id, so a pad token that equals the end token does no harm. A rank may
    have no row left in the last step of an epoch; its batch is one padding token, so that every rank takes the step.

    Args:
        rows: Documents of each row, in order.
        pad_token_id: Id that fills the end of shorter rows.
        denominator: Supervised weight of the whole optimizer step.
        shape: Rows and tokens to pad to, (B, S); `None`: as many rows as there are, padded to the longest.
    """
    used = [sum(len(document.input_ids) for document in row) for row in rows]
    shape = shape or (max(len(rows), 1), max(used, default=1))
    width = shape[1]
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    loss_weights = torch.zeros(shape, dtype=torch.float32)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    document_lengths: list[list[DocumentLength]] = []
    for r, row in enumerate([*rows, *[[]] * (shape[0] - len(rows))]):
        start = 0
        for document in row:
            end = start + len(document.input_ids)
            weights = torch.from_numpy(document.loss_weights.copy())
            weights[0] = 0.0  # no token before a document's first one predicts it
            ids = torch.from_numpy(document.input_ids.astype("int64"))
            input_ids[r, start:end] = ids
            labels[r, start:end] = torch.where(weights > 0, ids, IGNORE_INDEX)
            loss_weights[r, start:end] = weights
            position_ids[r, start:end] = torch.from_numpy(document.positions)
            start = end
        padding = width - start
        position_ids[r, start:] = torch.arange(padding)
        document_lengths.append([*(document.document_length for document in row), *([padding] if padding else [])])
    supervised = SupervisedPositions(labels)  # a document's first token has no label, so none is left out
    return Batch(
        input_ids=input_ids,
        labels=labels,
        loss_weights=loss_weights,
        position_ids=position_ids,
        document_lengths=DocumentLengths(document_lengths),
        denominator=denominator,
        num_tokens=sum(used),
        num_supervised=len(supervised),
        supervised=supervised,
    )
