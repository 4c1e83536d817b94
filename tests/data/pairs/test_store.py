from __future__ import annotations

import numpy as np
import pytest

from sft_lightning.data.pairs.store import Shortening, pair_store, shorten
from sft_lightning.data.tokens.flat_examples import flat_examples
from sft_lightning.data.tokens.store import TokenStore
from sft_lightning.data.tokens.tokenization import TokenizedBatch


def make_store(*examples: tuple[int, int], weight: float = 1.0) -> TokenStore:
    """Examples of (prompt, answer) tokens, two a record; ids count up through all of them."""
    counts = np.array([prompt + answer for prompt, answer in examples], np.int64)
    weights = np.concatenate([[0.0] * prompt + [weight] * answer for prompt, answer in examples]).astype(np.float32)
    ids = np.arange(counts.sum(), dtype=np.int32)
    records = np.arange(len(examples)) // 2
    marks = np.zeros(len(examples) // 2, np.uint32)
    return TokenStore(**vars(flat_examples(TokenizedBatch(ids, weights, counts))), records=records, marks=marks)


@pytest.mark.parametrize(
    ("lengths", "limits", "expected"),
    [
        ((900, 50, 60), (1024, 300), (900, 50, 60)),
        ((900, 800, 60), (1024, 300), (300, 724, 60)),
        ((200, 900, 60), (1024, 300), (200, 824, 60)),
        ((600, 10, 10), (512, 512), (512, 0, 0)),
    ],
)
def test_long_pairs_are_shortened_as_by_firefly(
    lengths: tuple[int, ...], limits: tuple[int, int], expected: tuple[int, ...]
) -> None:
    found = shorten(*(np.array([length]) for length in lengths), Shortening(*limits))
    assert tuple(int(part[0]) for part in found) == expected


def test_a_pair_is_its_two_examples_one_after_the_other() -> None:
    store = pair_store(make_store((3, 2), (3, 4), (2, 2), (2, 1)))
    assert store.lengths.tolist() == [12, 7]
    assert store.supervised.tolist() == [6, 3]
    assert store.weights.tolist() == [1.0, 1.0]
    pair = store.example(1, 0, 7)
    chosen, rejected = pair.halves()
    assert chosen.input_ids.tolist() == [12, 13, 14, 15]
    assert rejected.input_ids.tolist() == [16, 17, 18]
    assert rejected.loss_weights.tolist() == [0, 0, 1]


def test_the_weight_of_a_pair_does_not_depend_on_the_number_of_its_tokens() -> None:
    store = pair_store(make_store((3, 2), (3, 40), weight=0.5))
    assert store.weights.tolist() == [0.5]
    assert store.weigh(np.array([[0, 0, 48]])).tolist() == [0.5]


def test_the_prompt_is_cut_from_the_left_and_then_the_answers_from_the_right() -> None:
    store = pair_store(make_store((6, 8), (6, 2)), Shortening(max_length=10, max_prompt_length=3))
    chosen, rejected = store.example(0, 0, int(store.lengths[0])).halves()
    assert chosen.input_ids.tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]  # 3 of the prompt, 7 of the answer
    assert rejected.input_ids.tolist() == [17, 18, 19, 20, 21]
    assert (store.supervised.tolist(), store.lost.tolist(), store.whole_lengths.tolist()) == ([9], [1], [22])


def test_pairs_that_fit_are_not_shortened() -> None:
    whole = make_store((6, 3), (6, 2))
    plain, limited = pair_store(whole), pair_store(whole, Shortening(max_length=10, max_prompt_length=1))
    assert plain.spans.tolist() == limited.spans.tolist()
    assert limited.lost.tolist() == [0]


def test_a_pair_with_one_unsupervised_answer_counts_as_unsupervised() -> None:
    assert pair_store(make_store((3, 2), (3, 0))).supervised.tolist() == [0]


def test_examples_that_are_not_pairs_are_refused() -> None:
    store = make_store((3, 2), (3, 2))
    with pytest.raises(ValueError, match="not pairs"):
        pair_store(TokenStore(**{**vars(store), "records": np.array([0, 1])}))
    with pytest.raises(ValueError, match="a pair cannot be cut"):
        pair_store(store).example(0, 0, 3)
