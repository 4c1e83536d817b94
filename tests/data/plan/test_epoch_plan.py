from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_lightning.data.plan.epoch_plan import (
    EpochExamples,
    EpochPlan,
    Packing,
    Topology,
    by_length,
    plan_epoch,
    source_amounts,
)

LENGTHS = np.random.default_rng(0).integers(1, 30, 57)
WEIGHTS = np.random.default_rng(1).random(57)


def weigh(documents: np.ndarray) -> np.ndarray:
    """The share of its example's weight that a document has."""
    weights: np.ndarray = WEIGHTS[documents[:, 0]] * (documents[:, 2] - documents[:, 1]) / LENGTHS[documents[:, 0]]
    return weights


def ones(documents: np.ndarray) -> np.ndarray:
    return np.ones(len(documents))


def examples_of(
    lengths: np.ndarray, sources: np.ndarray | None = None, amounts: np.ndarray | None = None
) -> EpochExamples:
    return EpochExamples(
        np.arange(len(lengths)),
        np.zeros(len(lengths), np.int64) if sources is None else sources,
        lengths,
        lengths.astype(np.float64) if amounts is None else amounts,
    )


def plan(
    *,
    rows_per_step: int = 4,
    packing: Packing = "best_fit",
    shuffle: tuple[int, int] | None = (0, 0),
    sources: np.ndarray | None = None,
) -> EpochPlan:
    return plan_epoch(
        examples_of(LENGTHS, sources),
        weigh,
        packing=packing,
        max_length=32,
        rows_per_step=rows_per_step,
        shuffle=shuffle,
    )


TWO_SOURCES = np.arange(57) % 3 // 2
SOURCES = pytest.mark.parametrize("sources", [None, TWO_SOURCES], ids=["one source", "two sources"])


@SOURCES
@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_every_example_is_in_exactly_one_row(packing: Packing, sources: np.ndarray | None) -> None:
    made = plan(packing=packing, sources=sources)
    assert sorted(made.documents[:, 0].tolist()) == list(range(57))
    assert made.documents[:, 2].tolist() == LENGTHS[made.documents[:, 0]].tolist()
    assert all(made.row(r)[:, 2].sum() <= 32 for r in range(made.num_rows))


@SOURCES
def test_concat_has_every_token_once(sources: np.ndarray | None) -> None:
    made = plan(packing="concat", sources=sources)
    tokens = [(i, token) for i, start, stop in made.documents.tolist() for token in range(start, stop)]
    assert sorted(tokens) == [(i, token) for i, n in enumerate(LENGTHS.tolist()) for token in range(n)]
    assert sorted(made.rows.lengths.tolist())[1:] == [32] * (made.num_rows - 1)


@SOURCES
@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_the_weights_of_all_steps_add_up_to_the_weight_of_the_data(
    packing: Packing, sources: np.ndarray | None
) -> None:
    made = plan(rows_per_step=5, packing=packing, sources=sources)
    assert sum(made.step_weight(step) for step in range(made.num_steps)) == pytest.approx(WEIGHTS.sum())


def test_the_weight_of_a_step_is_the_sum_over_the_documents_of_its_rows() -> None:
    made = plan(rows_per_step=3)
    documents = np.concatenate([made.row(row) for row in range(3, 6)])
    assert made.step_weight(1) == pytest.approx(weigh(documents).sum())


@SOURCES
@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_the_plan_depends_on_seed_and_epoch_alone(packing: Packing, sources: np.ndarray | None) -> None:
    def documents(*shuffle: int) -> list[list[int]]:
        made = plan(packing=packing, sources=sources, shuffle=(shuffle[0], shuffle[1])).documents
        return made.tolist()  # type: ignore[no-any-return]

    assert documents(0, 0) == documents(0, 0)
    assert documents(0, 0) != documents(0, 1)
    assert documents(0, 0) != documents(1, 0)


def test_without_shuffling_the_order_stays() -> None:
    assert plan(packing="none", shuffle=None).documents[:, 0].tolist() == list(range(57))


def test_an_example_that_is_chosen_twice_is_trained_on_twice() -> None:
    chosen = examples_of(LENGTHS).take(np.repeat(np.arange(57), 2))
    made = plan_epoch(chosen, weigh, packing="best_fit", max_length=32, rows_per_step=4, shuffle=(0, 0))
    assert sorted(made.documents[:, 0].tolist()) == np.repeat(np.arange(57), 2).tolist()
    assert made.row_weights.sum() == pytest.approx(2 * WEIGHTS.sum())


SPLITS = [s for s in itertools.product((1, 2, 4, 8), repeat=3) if s[0] * s[1] * s[2] == 8]


@pytest.mark.parametrize(("batch_size", "accumulate", "world_size"), SPLITS)
def test_a_step_has_the_same_rows_for_any_split_of_the_global_batch(
    batch_size: int, accumulate: int, world_size: int
) -> None:
    made = plan(rows_per_step=8)
    ranks = [
        Topology(batch_size=batch_size, accumulate=accumulate, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    for step in range(made.num_steps):
        micro_batches = range(step * accumulate, min((step + 1) * accumulate, made.num_micro_batches(ranks[0])))
        taken = [row for index in micro_batches for rank in ranks for row in made.micro_batch(index, rank)]
        assert taken == list(range(step * 8, min((step + 1) * 8, made.num_rows)))


@given(rows=st.integers(0, 40), batch_size=st.integers(1, 4), accumulate=st.integers(1, 4), world=st.integers(1, 4))
def test_no_row_is_lost_or_repeated_in_the_last_partial_step(
    rows: int, batch_size: int, accumulate: int, world: int
) -> None:
    ranks = [Topology(batch_size=batch_size, accumulate=accumulate, world_size=world, rank=r) for r in range(world)]
    made = plan_epoch(
        examples_of(np.ones(rows, np.int64)), ones,
        packing="none", max_length=1, rows_per_step=ranks[0].rows_per_step, shuffle=(0, 0),
    )  # fmt: skip
    taken = [
        row
        for index in range(made.num_micro_batches(ranks[0]))
        for rank in ranks
        for row in made.micro_batch(index, rank)
    ]
    assert taken == list(range(rows))
    assert sorted(made.documents[:, 0].tolist()) == list(range(rows))
    assert made.num_steps == -(-rows // ranks[0].rows_per_step)
    assert made.row_weights.sum() == rows


EXAMPLE = st.tuples(st.integers(1, 64), st.integers(0, 3), st.integers(1, 64))


@settings(deadline=None)
@given(examples=st.lists(EXAMPLE, min_size=1, max_size=120), unit=st.sampled_from(["tokens", "examples", "supervised"]))
def test_every_prefix_has_the_share_of_each_source_to_within_a_packed_row(
    examples: list[tuple[int, int, int]], unit: str
) -> None:
    lengths, sources, supervised = np.array(examples, np.int64).T
    amounts = {"tokens": lengths, "examples": np.ones(len(lengths)), "supervised": np.minimum(lengths, supervised)}
    chosen = examples_of(lengths, sources, amounts[unit].astype(np.float64))
    made = plan_epoch(chosen, ones, packing="best_fit", max_length=64, rows_per_step=4, shuffle=(0, 0))
    assert sorted(made.documents.tolist()) == [[i, 0, n] for i, n in enumerate(lengths.tolist())]
    assert made.rows.lengths.max() <= 64
    of_rows = np.zeros((made.num_rows, 4))
    for row in range(made.num_rows):
        for index, _, _ in made.row(row).tolist():
            of_rows[row, sources[index]] += chosen.amounts[index]
    assert np.allclose(of_rows[:, : sources.max() + 1], source_amounts(made.rows, chosen))
    so_far = np.cumsum(of_rows, axis=0)
    shares = so_far[-1] / so_far[-1].sum()
    off = np.abs(so_far - so_far.sum(axis=1, keepdims=True) * shares)
    assert off.max() <= of_rows.sum(axis=1).max() + 1e-6


@settings(deadline=None)
@given(examples=st.lists(st.tuples(st.integers(1, 16), st.integers(0, 3)), min_size=1, max_size=120))
def test_concat_keeps_shares_to_within_a_row_if_no_example_is_longer_than_a_row(
    examples: list[tuple[int, int]],
) -> None:
    lengths, sources = np.array(examples, np.int64).T
    chosen = examples_of(lengths, sources)
    made = plan_epoch(chosen, ones, packing="concat", max_length=64, rows_per_step=4, shuffle=(0, 0))
    so_far = np.cumsum(source_amounts(made.rows, chosen), axis=0)
    off = np.abs(so_far - so_far.sum(axis=1, keepdims=True) * so_far[-1] / so_far[-1].sum())
    assert off.max() <= 64


def test_packing_each_source_on_its_own_still_fills_rows() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(4.6, 0.7, 20_000).astype(np.int64).clip(20, 2048)
    made = plan_epoch(
        examples_of(lengths, generator.integers(0, 4, 20_000)), ones,
        packing="best_fit", max_length=2048, rows_per_step=16, shuffle=(0, 0),
    )  # fmt: skip
    assert lengths.sum() / (made.num_rows * 2048) >= 0.99


def padding(lengths: np.ndarray, rows_per_step: int) -> int:
    """Tokens that fill the rows of each step up to its longest."""
    steps = [lengths[first : first + rows_per_step] for first in range(0, len(lengths), rows_per_step)]
    return sum(int(step.max()) * len(step) - int(step.sum()) for step in steps)


@pytest.mark.parametrize("num_sources", [1, 3])
def test_without_packing_the_rows_of_a_step_have_similar_lengths(num_sources: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 1003)
    made = plan_epoch(
        examples_of(lengths, np.arange(1003) % num_sources), ones,
        packing="none", max_length=512, rows_per_step=8, shuffle=(0, 0),
    )  # fmt: skip
    assert sorted(made.documents[:, 0].tolist()) == list(range(1003))
    assert padding(made.rows.lengths, 8) < padding(lengths, 8) / 8


def test_steps_of_similar_lengths_are_shuffled_and_the_partial_step_is_last() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 131)
    order = by_length(lengths, 8, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(131))
    means = [lengths[order[first : first + 8]].mean() for first in range(0, 128, 8)]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)
    assert sorted(order[128:].tolist()) == [128, 129, 130]


def test_without_rows_there_is_nothing_to_order() -> None:
    assert len(by_length(np.zeros(0, np.int64), 8, np.random.default_rng(0))) == 0


def test_a_position_counts_complete_steps_for_any_split_of_the_global_batch() -> None:
    made = plan(rows_per_step=4, packing="none")
    topology = Topology(batch_size=2, accumulate=2)
    assert [made.micro_batches_done(rows, topology) for rows in (0, 3, 4, 9, 56, 57)] == [0, 0, 2, 4, 28, 29]
