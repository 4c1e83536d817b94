from __future__ import annotations

import numpy as np

from sft_lightning.data.pairs.collate import PairBatch, collate_pairs
from sft_lightning.data.pairs.store import PairExample
from sft_lightning.types import SharedPrompt


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


def test_without_packing_each_example_of_a_pair_has_its_own_row() -> None:
    batch = make(together=False)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 4, 0], [5, 6, 0], [5, 7, 8], [9, 10, 0], [9, 11, 0]]
    assert batch["answer_lengths"] == [2, 1, 1, 2, 1, 1]


def test_a_rank_without_rows_has_a_batch_without_pairs() -> None:
    batch = collate_pairs([], together=True, pad_token_id=0, denominator=3.0)
    assert batch["input_ids"].shape == (1, 1)
    assert batch["pairs"].tolist() == batch["answer_lengths"] == []


def asked(prompt: list[int], chosen: list[int], rejected: list[int]) -> PairExample:
    parts = [prompt, chosen, prompt, rejected]
    weights = [np.full(len(part), float(number % 2), np.float32) for number, part in enumerate(parts)]
    ids = np.array([token for part in parts for token in part], np.int32)
    return PairExample(ids, np.concatenate(weights), len(prompt) + len(chosen), 1.0)


def test_a_shared_prompt_is_there_once_except_the_token_before_the_answers() -> None:
    pairs = [(0, asked([1, 2, 3], [4, 5], [6])), (1, asked([1], [4], [6]))]
    batch = collate_pairs([pairs], together=True, pad_token_id=0, denominator=1.0, share=True)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 3, 6, 1, 4, 1, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 4, 5, -100, 6, -100, 4, -100, 6]]
    [[first, *others]] = batch["document_lengths"]
    assert first == SharedPrompt(common=2, first=3, second=2)
    assert others == [2, 2]  # a prompt of one token: nothing is left to share
    assert batch["answer_lengths"] == [2, 1, 1, 1]


def test_answers_with_a_common_beginning_share_no_label() -> None:
    batch = collate_pairs(
        [[(0, asked([1, 2], [4, 5], [4, 6]))]], together=False, pad_token_id=0, denominator=1.0, share=True
    )
    assert batch["input_ids"].tolist() == [[1, 2, 4, 5, 2, 4, 6]]
    assert batch["labels"].tolist() == [[-100, -100, 4, 5, -100, 4, 6]]


def test_conversations_that_differ_early_share_the_turns_before() -> None:
    weights = np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32)
    one = PairExample(np.array([1, 2, 9, 4, 1, 2, 8, 4], np.int32), weights, 4, 1.0)
    batch = collate_pairs([[(0, one)]], together=True, pad_token_id=0, denominator=1.0, share=True)
    assert batch["input_ids"].tolist() == [[1, 2, 9, 4, 8, 4]]
