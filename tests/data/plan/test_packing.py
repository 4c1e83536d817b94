from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_lightning.data.plan.packing import Rows, best_fit, concat, join_rows, one_per_row


def lengths(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def as_lists(rows: Rows) -> list[list[list[int]]]:
    """The documents of each row."""
    return [rows.documents[start:stop].tolist() for start, stop in itertools.pairwise(rows.starts.tolist())]


@pytest.mark.parametrize(
    ("given_lengths", "expected"),
    [
        ((3, 3, 3, 3), [3, 9]),
        ((5, 5), [10]),
        ((4, 6), [10]),
        ((10,), [10]),
        ((), []),
        ((6, 5, 4, 3, 2), [10, 10]),
        ((9, 8, 1, 1, 1), [10, 10]),
    ],
)
def test_an_example_goes_into_the_fullest_row_with_room(given_lengths: tuple[int, ...], expected: list[int]) -> None:
    assert sorted(best_fit(lengths(*given_lengths), 10).lengths.tolist()) == expected


def best_fit_decreasing(values: list[int], max_length: int) -> list[int]:
    """The textbook's, one example after the other: tokens of each row."""
    used: list[int] = []
    for value in sorted(values, reverse=True):
        fitting = [row for row, tokens in enumerate(used) if tokens + value <= max_length]
        if fitting:
            used[max(fitting, key=used.__getitem__)] += value
        else:
            used.append(value)
    return used


@given(values=st.lists(st.integers(1, 64), max_size=200), room=st.integers(0, 36))
def test_rows_are_those_of_best_fit_decreasing_one_example_at_a_time(values: list[int], room: int) -> None:
    rows = best_fit(lengths(*values), 64 + room)
    assert sorted(rows.lengths.tolist()) == sorted(best_fit_decreasing(values, 64 + room))


@given(st.lists(st.integers(1, 64), max_size=200))
def test_every_example_is_in_exactly_one_row_and_no_row_is_empty_or_too_long(values: list[int]) -> None:
    rows = best_fit(lengths(*values), 64)
    assert sorted(rows.documents.tolist()) == [[i, 0, n] for i, n in enumerate(values)]
    assert all(0 < n <= 64 for n in rows.lengths.tolist())
    assert all(rows.counts > 0)


@given(st.lists(st.integers(1, 32), max_size=120))
def test_no_two_rows_would_fit_into_one(values: list[int]) -> None:
    totals = sorted(best_fit(lengths(*values), 32).lengths.tolist())
    assert all(first + second > 32 for first, second in itertools.pairwise(totals))


def test_alpaca_like_lengths_fill_99_5_percent_of_rows_of_2048_tokens() -> None:
    drawn = np.random.default_rng(0).lognormal(4.6, 0.7, 20_000).astype(np.int64).clip(20, 2048)
    assert drawn.sum() / (len(best_fit(drawn, 2048)) * 2048) >= 0.995


@pytest.mark.parametrize("value", [0, 11])
def test_a_length_that_fits_no_row_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.10"):
        best_fit(lengths(3, value), 10)


def test_without_packing_every_example_is_a_row() -> None:
    assert as_lists(one_per_row(lengths(3, 5))) == [[[0, 0, 3]], [[1, 0, 5]]]


def test_concat_cuts_every_max_length_tokens() -> None:
    assert as_lists(concat(lengths(3, 6, 2), 4)) == [[[0, 0, 3], [1, 0, 1]], [[1, 1, 5]], [[1, 5, 6], [2, 0, 2]]]


def test_concat_of_nothing_has_no_rows() -> None:
    assert len(concat(lengths(), 4)) == len(concat(lengths(), 4).documents) == 0


@given(st.lists(st.integers(1, 40), max_size=60))
def test_concat_has_each_token_in_exactly_one_row_and_fills_every_row_but_the_last(values: list[int]) -> None:
    rows = concat(lengths(*values), 16)
    tokens = [(i, token) for i, start, stop in rows.documents.tolist() for token in range(start, stop)]
    assert tokens == [(i, token) for i, n in enumerate(values) for token in range(n)]
    assert all(n == 16 for n in rows.lengths.tolist()[:-1])
    assert all(0 < n <= 16 for n in rows.lengths.tolist())


ROWS = concat(lengths(3, 6, 2), 4)


def test_rows_can_be_taken_in_any_order_and_more_than_once() -> None:
    first, second, third = as_lists(ROWS)
    assert as_lists(ROWS.take(lengths(2, 0, 0, 1))) == [third, first, first, second]
    assert as_lists(ROWS.take(lengths())) == []


def test_the_examples_of_rows_can_be_renumbered() -> None:
    assert as_lists(ROWS.renumbered(lengths(7, 8, 9)))[0] == [[7, 0, 3], [8, 0, 1]]
    assert ROWS.documents[0].tolist() == [0, 0, 3]


def test_values_of_documents_are_summed_over_rows() -> None:
    assert ROWS.sums(np.array([1.0, 2.0, 4.0, 8.0, 16.0])).tolist() == [3, 4, 24]
    assert ROWS.counts.tolist() == [2, 1, 2]
    assert ROWS.lengths.tolist() == [4, 4, 3]


def test_rows_are_joined_in_order() -> None:
    assert as_lists(join_rows([ROWS, one_per_row(lengths(5))])) == [*as_lists(ROWS), [[0, 0, 5]]]
    assert as_lists(join_rows([])) == []
