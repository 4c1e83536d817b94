from __future__ import annotations

import numpy as np

from sft_lightning.data.pairs_collate import PairBatch, collate_pairs
from sft_lightning.data.pairs_store import PairExample


def pair(chosen: list[int], rejected: list[int]) -> PairExample:
    ids = np.array([*chosen, *rejected], np.int32)
    weights = np.ones(len(ids), np.float32)
    weights[[0, len(chosen)]] = 0
    return PairExample(ids, weights, len(chosen), 1.0)


ROWS = [[(7, pair([1, 2, 3], [1, 4])), (2, pair([5, 6], [5, 7, 8]))], [(4, pair([9, 10], [9, 11]))]]


def make(*, together: bool) -> PairBatch:
    return collate_pairs(ROWS, together=together, pad_token_id=0, denominator=3.0)


def test_packed_pairs_are_documents_of_one_row() -> None:
    batch = make(together=True)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 1, 4, 5, 6, 5, 7, 8], [9, 10, 9, 11, 0, 0, 0, 0, 0, 0]]
    assert batch["document_lengths"] == [[3, 2, 2, 3], [2, 2, 6]]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 1, 2]
    assert batch["pairs"].tolist() == [7, 2, 4]
    assert batch["answer_lengths"] == [2, 1, 1, 2, 1, 1]
    assert batch["pair_weights"].tolist() == [1, 1, 1]


def test_unpacked_pairs_have_two_rows() -> None:
    batch = make(together=False)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 4, 0], [5, 6, 0], [5, 7, 8], [9, 10, 0], [9, 11, 0]]
    assert batch["answer_lengths"] == [2, 1, 1, 2, 1, 1]


def test_a_rank_without_rows_has_a_batch_without_pairs() -> None:
    batch = collate_pairs([], together=True, pad_token_id=0, denominator=3.0)
    assert batch["input_ids"].shape == (1, 1)
    assert batch["pairs"].tolist() == batch["answer_lengths"] == []
