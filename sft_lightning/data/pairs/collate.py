"""Rows of pairs → PairBatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sft_lightning.data.batches.collate import collate
from sft_lightning.data.pairs.store import PairExample, share_prompt
from sft_lightning.types import Batch, TokenizedExample


class PairBatch(Batch):
    """A micro-batch of P pairs; a row's documents are chosen, rejected, chosen, …, or each has a row of its own."""

    pairs: torch.Tensor
    """Which pair each is, as the plan counts them, (P,) int64."""

    pair_weights: torch.Tensor
    """What each pair's loss weighs, (P,) float32."""

    answer_lengths: list[int]
    """Supervised tokens of each example in the order of the rows: chosen, rejected, chosen, …, (2P)."""


def collate_pairs(
    rows: Sequence[Sequence[tuple[int, PairExample]]],
    *,
    together: bool,
    pad_token_id: int,
    denominator: float,
    share: bool = False,
) -> PairBatch:
    """Lay rows of pairs out as one padded micro-batch.

    Args:
        rows: Number and examples of each pair, row by row.
        together: Whether all examples of a row are documents of one row; else each has a row of its own, for models
            whose documents would see each other.
        pad_token_id: Id to fill the end of shorter rows with.
        denominator: Weight of all pairs of the optimizer step.
        share: Whether what both conversations of a pair begin with stands there once; only packed attention knows how
            to read that.
    """
    pairs = [pair for row in rows for pair in row]
    documents = [[document for _, pair in row for document in _documents(pair, share)] for row in rows]
    if not together:
        documents = [[document] for row in documents for document in row]
    batch = collate(documents, pad_token_id=pad_token_id, denominator=denominator)
    return PairBatch(
        **batch,
        pairs=torch.tensor([index for index, _ in pairs], dtype=torch.int64),
        pair_weights=torch.tensor([pair.weight for _, pair in pairs], dtype=torch.float32),
        answer_lengths=[int((document.loss_weights[1:] > 0).sum()) for _, pair in pairs for document in pair.halves()],
    )


def _documents(pair: PairExample, share: bool) -> Sequence[TokenizedExample]:
    shared = share_prompt(pair) if share else None
    return pair.halves() if shared is None else [shared]
