"""Rows of pairs → PairBatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sft_lightning.batch import Batch
from sft_lightning.data.batches.collate import collate
from sft_lightning.data.pairs.store import PairExample, share_prompt
from sft_lightning.types import TokenizedExample


class PairBatch(Batch):
    """A micro-batch of P pairs. The documents of a row are chosen, rejected, chosen, …; or each has its own row."""

    pairs: torch.Tensor
    """Number of each pair in the plan, (P,) int64."""

    pair_weights: torch.Tensor
    """Weight of each pair's loss, (P,) float32."""

    answer_lengths: list[int]
    """Supervised tokens of each example, 2P of them, in the order of the rows: chosen, rejected, chosen, …"""

    num_answer_tokens: torch.Tensor
    """The same on the device of the batch, (P, 2) int64."""


def collate_pairs(
    rows: Sequence[Sequence[tuple[int, PairExample]]],
    *,
    together: bool,
    pad_token_id: int,
    denominator: float,
    share: bool = False,
    shape: tuple[int, int] | None = None,
) -> PairBatch:
    """Return rows of pairs as one padded micro-batch.

    Args:
        rows: Number and examples of each pair, row by row.
        together: Whether the examples of a row are documents of one row. Else each example has its own row, for models
            whose documents would see each other.
        pad_token_id: Id that fills the end of shorter rows.
        denominator: Weight of all pairs of the optimizer step.
        share: Whether the common beginning of a pair is in the row once, which only packed attention supports.
        shape: Rows and tokens to pad to, (B, S); `None`: as many rows as there are, padded to the longest.
    """
    pairs = [pair for row in rows for pair in row]
    documents = [[document for _, pair in row for document in _documents(pair, share)] for row in rows]
    if not together:
        documents = [[document] for row in documents for document in row]
    batch = collate(documents, pad_token_id=pad_token_id, denominator=denominator, shape=shape)
    answers = [int((document.loss_weights[1:] > 0).sum()) for _, pair in pairs for document in pair.halves()]
    return PairBatch(
        **batch,
        pairs=torch.tensor([index for index, _ in pairs], dtype=torch.int64),
        pair_weights=torch.tensor([pair.weight for _, pair in pairs], dtype=torch.float32),
        answer_lengths=answers,
        num_answer_tokens=torch.tensor(answers, dtype=torch.int64).view(-1, 2),
    )


def _documents(pair: PairExample, share: bool) -> Sequence[TokenizedExample]:
    shared = share_prompt(pair) if share else None
    return pair.halves() if shared is None else [shared]
