from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sft_lightning.data.blending import blend


def test_weight_one_sees_every_example_once() -> None:
    assert blend([3, 2], [1.0, 1.0], seed=0, epoch=4).tolist() == [0, 1, 2, 3, 4]


def test_weight_two_sees_every_example_twice() -> None:
    assert blend([2, 1], [2.0, 1.0], seed=0, epoch=0).tolist() == [0, 0, 1, 1, 2]


def test_weight_a_half_shows_the_other_half_in_the_next_epoch() -> None:
    first, second = (blend([10], [0.5], seed=7, epoch=epoch).tolist() for epoch in (0, 1))
    assert len(first) == len(second) == 5
    assert sorted(first + second) == list(range(10))


def test_the_choice_depends_on_the_seed_alone() -> None:
    assert blend([99], [0.3], seed=1, epoch=2).tolist() == blend([99], [0.3], seed=1, epoch=2).tolist()
    assert blend([99], [0.3], seed=1, epoch=2).tolist() != blend([99], [0.3], seed=2, epoch=2).tolist()


@given(count=st.integers(1, 40), weight=st.floats(0.05, 3.0), epochs=st.integers(1, 6))
def test_no_example_is_seen_twice_more_than_another(count: int, weight: float, epochs: int) -> None:
    seen = Counter(i for epoch in range(epochs) for i in blend([count], [weight], seed=0, epoch=epoch).tolist())
    times = [seen[i] for i in range(count)]
    assert max(times) - min(times) <= 1
    assert sum(times) == epochs * round(weight * count)
