from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sft_lightning.data.tokens.flat_examples import flat_examples
from sft_lightning.data.tokens.tokenization import TokenizedBatch


def batch_of(*examples: tuple[list[int], list[float]]) -> TokenizedBatch:
    """Examples, each of token ids and loss weights."""
    return TokenizedBatch(
        np.array([token for ids, _ in examples for token in ids], np.int32),
        np.array([weight for _, weights in examples for weight in weights], np.float32),
        np.array([len(ids) for ids, _ in examples], np.int64),
    )


BATCH = batch_of(([5, 6, 7], [1, 0, 2]), ([8], [1]), ([9, 10], [0, 0.5]))
EXAMPLES = flat_examples(BATCH)


def test_examples_come_back_as_they_went_in() -> None:
    back = EXAMPLES.example(0, 0, 3)
    assert back.input_ids.tolist() == [5, 6, 7]
    assert back.loss_weights.tolist() == [1, 0, 2]
    assert EXAMPLES.lengths.tolist() == [3, 1, 2]
    assert len(EXAMPLES) == 3


def test_an_example_can_be_cut() -> None:
    assert EXAMPLES.example(2, 0, 1).input_ids.tolist() == [9]
    assert EXAMPLES.example(0, 1, 3).input_ids.tolist() == [6, 7]


def test_the_first_token_of_a_document_counts_for_nothing() -> None:
    documents = np.array([[0, 0, 3], [1, 0, 1], [2, 0, 2]])
    assert EXAMPLES.weigh(documents).tolist() == [2, 0, 0.5]
    assert EXAMPLES.supervise(documents).tolist() == EXAMPLES.supervised.tolist() == [1, 0, 1]


def test_weights_follow_a_cut() -> None:
    documents = np.array([[0, 0, 2], [0, 1, 3], [0, 2, 3], [0, 0, 0]])
    assert EXAMPLES.weigh(documents).tolist() == [0, 2, 0, 0]
    assert EXAMPLES.supervise(documents).tolist() == [0, 1, 0, 0]


def test_a_batch_without_examples_has_none() -> None:
    empty = flat_examples(batch_of())
    nothing = np.zeros((0, 3), np.int64)
    assert len(empty) == len(empty.weigh(nothing)) == len(empty.supervise(nothing)) == 0


WEIGHTS = st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), max_size=12)


@given(data=st.data(), weights=st.lists(WEIGHTS, min_size=1, max_size=6))
def test_sums_over_any_part_of_any_example_are_those_of_adding_up(
    data: st.DataObject, weights: list[list[float]]
) -> None:
    examples = flat_examples(batch_of(*((list(range(len(each))), each) for each in weights)))
    documents = []
    for index in data.draw(st.lists(st.integers(0, len(weights) - 1), min_size=1, max_size=8)):
        start, stop = sorted(data.draw(st.tuples(*(st.integers(0, len(weights[index])),) * 2)))
        documents.append([index, start, stop])
    parts = [weights[index][start + 1 : stop] for index, start, stop in documents]
    assert examples.weigh(np.array(documents)).tolist() == [sum(part) for part in parts]
    assert examples.supervise(np.array(documents)).tolist() == [sum(weight > 0 for weight in part) for part in parts]
