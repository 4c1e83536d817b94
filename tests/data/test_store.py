from __future__ import annotations

import numpy as np

from sft_lightning.data.store import TokenStore
from sft_lightning.types import TokenizedExample


def example(ids: list[int], weights: list[float]) -> TokenizedExample:
    return TokenizedExample(np.array(ids, np.int32), np.array(weights, np.float32))


STORE = TokenStore.from_examples([example([5, 6, 7], [1, 0, 2]), example([8], [1]), example([9, 10], [0, 0.5])])


def test_examples_come_back_as_they_went_in() -> None:
    back = STORE.example(0, 0, 3)
    assert back.input_ids.tolist() == [5, 6, 7]
    assert back.loss_weights.tolist() == [1, 0, 2]
    assert STORE.lengths.tolist() == [3, 1, 2]
    assert len(STORE) == 3


def test_an_example_can_be_cut() -> None:
    assert STORE.example(2, 0, 1).input_ids.tolist() == [9]
    assert STORE.example(0, 1, 3).input_ids.tolist() == [6, 7]


def test_the_first_token_of_a_document_counts_for_nothing() -> None:
    assert STORE.weigh(np.array([[0, 0, 3], [1, 0, 1], [2, 0, 2]])).tolist() == [2, 0, 0.5]
    assert STORE.supervised_tokens(STORE.lengths).tolist() == [1, 0, 1]


def test_weights_follow_a_cut() -> None:
    assert STORE.weigh(np.array([[0, 0, 2], [0, 1, 3], [0, 2, 3]])).tolist() == [0, 2, 0]
    assert STORE.supervised_tokens(np.array([2, 1, 0])).tolist() == [0, 0, 0]


def test_stores_are_joined_in_order() -> None:
    joined = TokenStore.concatenate([STORE, STORE])
    assert len(joined) == 6
    assert joined.example(5, 0, 2).input_ids.tolist() == [9, 10]


def test_no_examples_make_an_empty_store() -> None:
    empty = TokenStore.from_examples([])
    assert len(empty) == 0
    assert empty.supervised_tokens(empty.lengths).tolist() == []
