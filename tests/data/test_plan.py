from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_lightning.data.plan import EpochPlan, Packing, Topology, plan_epoch

LENGTHS = np.random.default_rng(0).integers(1, 30, 57)
WEIGHTS = np.random.default_rng(1).random(57)


def weigh(documents: np.ndarray) -> np.ndarray:
    """The share of its example's weight that a document has."""
    return WEIGHTS[documents[:, 0]] * (documents[:, 2] - documents[:, 1]) / LENGTHS[documents[:, 0]]


def plan(
    *, rows_per_step: int = 4, packing: Packing = "best_fit", shuffle: tuple[int, int] | None = (0, 0)
) -> EpochPlan:
    return plan_epoch(
        np.arange(57), LENGTHS, weigh, packing=packing, max_length=32, rows_per_step=rows_per_step, shuffle=shuffle
    )


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_every_example_is_in_exactly_one_row(packing: Packing) -> None:
    made = plan(packing=packing)
    assert sorted(made.documents[:, 0].tolist()) == list(range(57))
    assert made.documents[:, 2].tolist() == LENGTHS[made.documents[:, 0]].tolist()
    assert all(made.row(r)[:, 2].sum() <= 32 for r in range(made.num_rows))


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_the_weights_of_all_steps_add_up_to_the_weight_of_the_data(packing: Packing) -> None:
    made = plan(rows_per_step=5, packing=packing)
    assert sum(made.step_weight(step) for step in range(made.num_steps)) == pytest.approx(WEIGHTS.sum())


def test_the_same_seed_and_epoch_give_the_same_plan_and_another_epoch_another() -> None:
    assert plan().documents.tolist() == plan().documents.tolist()
    assert plan().documents.tolist() != plan(shuffle=(0, 1)).documents.tolist()
    assert plan().documents.tolist() != plan(shuffle=(1, 0)).documents.tolist()


def test_without_shuffling_the_order_stays() -> None:
    assert plan(packing="none", shuffle=None).documents[:, 0].tolist() == list(range(57))


SPLITS = [s for s in itertools.product((1, 2, 4, 8), repeat=3) if s[0] * s[1] * s[2] == 8]


@pytest.mark.parametrize(("batch_size", "accumulate", "world_size"), SPLITS)
def test_a_steps_rows_are_the_same_however_it_is_split(batch_size: int, accumulate: int, world_size: int) -> None:
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
        np.arange(rows), np.ones(rows, np.int64), lambda documents: np.ones(len(documents)),
        packing="none", max_length=1, rows_per_step=ranks[0].rows_per_step, shuffle=(0, 0),
    )  # fmt: skip
    taken = [
        row
        for index in range(made.num_micro_batches(ranks[0]))
        for rank in ranks
        for row in made.micro_batch(index, rank)
    ]
    assert taken == list(range(rows))
    assert made.num_steps == -(-rows // ranks[0].rows_per_step)
