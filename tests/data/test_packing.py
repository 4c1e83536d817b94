from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_lightning.data.packing import best_fit, concat, one_per_row


def lengths(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("given_lengths", "expected"),
    [((3, 3, 3, 3), [3, 9]), ((5, 5), [10]), ((4, 6), [10]), ((10,), [10]), ((), []), ((6, 5, 4, 3, 2), [10, 10])],
)
def test_rows_are_filled_best_fit_first(given_lengths: tuple[int, ...], expected: list[int]) -> None:
    rows = best_fit(lengths(*given_lengths), 10)
    assert sorted(sum(stop - start for _, start, stop in row) for row in rows) == expected


@given(st.lists(st.integers(1, 64), max_size=200))
def test_every_example_is_in_exactly_one_row_and_no_row_is_too_long(values: list[int]) -> None:
    rows = best_fit(lengths(*values), 64)
    assert sorted(part for row in rows for part in row) == [(i, 0, n) for i, n in enumerate(values)]
    assert all(0 < sum(values[i] for i, _, _ in row) <= 64 for row in rows)


@given(st.lists(st.integers(1, 32), max_size=120))
def test_no_two_rows_could_be_one(values: list[int]) -> None:
    totals = sorted(sum(values[i] for i, _, _ in row) for row in best_fit(lengths(*values), 32))
    assert all(first + second > 32 for first, second in itertools.pairwise(totals))


def test_alpaca_like_lengths_fill_rows_of_2048_to_995_per_mille() -> None:
    drawn = np.random.default_rng(0).lognormal(4.6, 0.7, 20_000).astype(np.int64).clip(20, 2048)
    assert drawn.sum() / (len(best_fit(drawn, 2048)) * 2048) >= 0.995


@pytest.mark.parametrize("value", [0, 11])
def test_a_length_that_fits_no_row_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.10"):
        best_fit(lengths(3, value), 10)


def test_without_packing_every_example_is_a_row() -> None:
    assert one_per_row(lengths(3, 5)) == [[(0, 0, 3)], [(1, 0, 5)]]


def test_concat_cuts_every_max_length_tokens() -> None:
    assert concat(lengths(3, 6, 2), 4) == [[(0, 0, 3), (1, 0, 1)], [(1, 1, 5)], [(1, 5, 6), (2, 0, 2)]]


@given(st.lists(st.integers(1, 40), max_size=60))
def test_concat_loses_no_token_and_fills_every_row_but_the_last(values: list[int]) -> None:
    rows = concat(lengths(*values), 16)
    tokens = [(i, token) for row in rows for i, start, stop in row for token in range(start, stop)]
    assert tokens == [(i, token) for i, n in enumerate(values) for token in range(n)]
    assert all(sum(stop - start for _, start, stop in row) == 16 for row in rows[:-1])
