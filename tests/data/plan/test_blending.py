from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_lightning.data.plan.blending import (
    BlendConfig,
    choose_examples,
    largest_deviation,
    passes_per_epoch,
    take_turns,
)
from sft_lightning.errors import UserError

SHARES = ("examples", "tokens", "supervised_tokens")
SIZES = [100.0, 40.0, 7.0]


def passes_of(weights: list[float], max_epochs: list[float] | None = None, **blend: Any) -> list[float]:
    return passes_per_epoch(SIZES, weights, max_epochs or [1.0] * 3, BlendConfig(**blend))


def amounts_of(times: list[float]) -> list[float]:
    return [each * size for each, size in zip(times, SIZES, strict=True)]


def test_by_epochs_the_weights_are_the_passes_and_max_epochs_is_ignored() -> None:
    assert passes_of([1.0, 2.0, 0.5], [0.1, 0.1, 0.1]) == [1.0, 2.0, 0.5]


@pytest.mark.parametrize("by", SHARES)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [5.0, 3.0, 2.0], [0.1, 0.2, 40.0]])
def test_shares_are_relative_weights_and_the_first_exhausted_source_ends_the_epoch(
    by: str, weights: list[float]
) -> None:
    times = passes_of(weights, by=by)
    shares = np.array(amounts_of(times)) / sum(amounts_of(times))
    assert shares == pytest.approx(np.array(weights) / sum(weights))
    assert max(times) == pytest.approx(1.0)


@pytest.mark.parametrize("by", SHARES)
def test_max_epochs_limits_the_passes_over_its_source(by: str) -> None:
    times = passes_of([1.0, 1.0, 1.0], [1.0, 1.0, 4.0], by=by)
    assert times == pytest.approx([28 / 100, 28 / 40, 4.0])
    assert passes_of([1.0, 1.0, 1.0], [1.0, 0.5, 4.0], by=by) == pytest.approx([20 / 100, 0.5, 20 / 7])


@pytest.mark.parametrize("by", ["epochs", *SHARES])
def test_temperature_one_changes_nothing(by: str) -> None:
    assert passes_of([3.0, 1.0, 2.0], by=by, temperature=1.0) == passes_of([3.0, 1.0, 2.0], by=by)


@pytest.mark.parametrize("by", ["epochs", *SHARES])
def test_a_high_temperature_gives_every_source_the_same_share(by: str) -> None:
    amounts = amounts_of(passes_of([3.0, 1.0, 2.0], by=by, temperature=1e9))
    assert amounts == pytest.approx([amounts[0]] * 3)


@pytest.mark.parametrize("by", SHARES)
def test_shares_are_raised_to_one_over_the_temperature(by: str) -> None:
    amounts = amounts_of(passes_of([16.0, 4.0, 1.0], by=by, temperature=2.0))
    assert np.array(amounts) / amounts[2] == pytest.approx([4, 2, 1])


def test_by_epochs_a_temperature_keeps_the_total_amount() -> None:
    assert sum(amounts_of(passes_of([1.0, 1.0, 1.0], temperature=3.0))) == pytest.approx(sum(SIZES))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(UserError, match=r"data\.blend\.temperature: must be above 0"):
        BlendConfig(temperature=temperature)


def chosen(counts: list[int], times: list[float], *, seed: int = 0, epoch: int = 0) -> list[list[int]]:
    return [each.tolist() for each in choose_examples([np.ones(n) for n in counts], times, seed=seed, epoch=epoch)]


def test_one_pass_sees_every_example_once() -> None:
    assert chosen([3, 2], [1.0, 1.0], epoch=4) == [[0, 1, 2], [0, 1]]


def test_two_passes_see_every_example_twice() -> None:
    assert chosen([2, 1], [2.0, 1.0]) == [[0, 0, 1, 1], [0]]


def test_half_a_pass_shows_the_other_half_in_the_next_epoch() -> None:
    first, second = (chosen([10], [0.5], seed=7, epoch=epoch)[0] for epoch in (0, 1))
    assert len(first) == len(second) == 5
    assert sorted(first + second) == list(range(10))


def test_the_chosen_examples_depend_on_the_seed_alone() -> None:
    assert chosen([99], [0.3], seed=1, epoch=2) == chosen([99], [0.3], seed=1, epoch=2)
    assert chosen([99], [0.3], seed=1, epoch=2) != chosen([99], [0.3], seed=2, epoch=2)


def test_sources_of_the_same_size_get_different_draws() -> None:
    first, second = chosen([99, 99], [0.3, 0.3])
    assert first != second


@given(
    amounts=st.lists(st.integers(1, 50), min_size=1, max_size=40), times=st.floats(0.05, 3.0), epochs=st.integers(1, 6)
)
def test_nothing_is_seen_twice_before_everything_was_seen_once(amounts: list[int], times: float, epochs: int) -> None:
    sizes = np.array(amounts, np.float64)
    seen: Counter[int] = Counter()
    for epoch in range(epochs):
        seen.update(choose_examples([sizes], [times], seed=0, epoch=epoch)[0].tolist())
        counts = [seen[i] for i in range(len(amounts))]
        assert max(counts) - min(counts) <= 1
        delivered = float(np.dot(counts, sizes))
        assert abs(delivered - (epoch + 1) * times * sizes.sum()) <= sizes.max() + 1e-6


def single(amounts: list[float], owners: list[int]) -> np.ndarray:
    table = np.zeros((len(amounts), max(owners) + 1))
    table[np.arange(len(amounts)), owners] = amounts
    return table


def test_sources_of_equal_share_alternate() -> None:
    owners = np.array([0, 0, 0, 1, 1, 1])
    order = take_turns(single([1.0] * 6, owners.tolist()), owners)
    assert owners[order].tolist() == [0, 1, 0, 1, 0, 1]


ROWS = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 4)), min_size=1, max_size=80)


@given(rows=ROWS)
def test_every_prefix_has_the_share_of_each_source_to_within_a_row(rows: list[tuple[int, int]]) -> None:
    owners = np.array([owner for _, owner in rows])
    amounts = single([float(amount) for amount, _ in rows], owners.tolist())
    order = take_turns(amounts, owners)
    assert sorted(order.tolist()) == list(range(len(rows)))
    for source in set(owners.tolist()):
        mine = order[owners[order] == source].tolist()
        assert mine == sorted(mine)  # rows of a source keep their order
    shares = amounts.sum(axis=0) / amounts.sum()
    had = np.zeros(amounts.shape[1])
    for row in order.tolist():
        had += amounts[row]
        assert np.abs(had - had.sum() * shares).max() <= amounts.sum(axis=1).max() + 1e-6
    assert largest_deviation(amounts[order]) <= 1 + 1e-6


def test_a_row_of_several_sources_counts_for_each_of_them() -> None:
    amounts = np.array([[5.0, 5.0], [5.0, 5.0], [10.0, 0.0], [0.0, 10.0]])
    order = take_turns(amounts, np.array([0, 0, 0, 1]))
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert largest_deviation(amounts[order]) <= 0.5


def test_the_largest_deviation_is_counted_in_rows() -> None:
    assert largest_deviation(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])) == 1.0
    assert largest_deviation(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])) == 0.5
    assert largest_deviation(np.zeros((0, 2))) == 0.0
