from __future__ import annotations

import pytest

from sft_lightning.data.splits import divide
from sft_lightning.errors import UserError
from sft_lightning.types import Record

RECORDS = [Record({"n": i}, "s", f"f, record {i}") for i in range(20)]


def test_both_sides_are_disjoint_complete_and_in_file_order() -> None:
    train, held_out = ([r.fields["n"] for r in side] for side in divide(RECORDS, 0.25, seed=(0, 0)))
    assert len(held_out) == 5
    assert sorted(train + held_out) == list(range(20))
    assert train == sorted(train)
    assert held_out == sorted(held_out)


def test_the_draw_depends_on_the_seed_alone() -> None:
    assert divide(RECORDS, 0.25, seed=(0, 0)) == divide(RECORDS, 0.25, seed=(0, 0))
    assert divide(RECORDS, 0.25, seed=(0, 0)) != divide(RECORDS, 0.25, seed=(1, 0))
    assert divide(RECORDS, 0.25, seed=(0, 0)) != divide(RECORDS, 0.25, seed=(0, 1))


def test_a_small_fraction_still_holds_out_one_record() -> None:
    assert len(divide(RECORDS, 0.001, seed=(0, 0))[1]) == 1


def test_a_fraction_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(UserError, match="leaves none to train on"):
        divide(RECORDS[:1], 0.1, seed=(0, 0))
