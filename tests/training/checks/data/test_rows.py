from __future__ import annotations

import pytest

from sft_lightning.batch import RowSums
from sft_lightning.training.checks.data.rows import compare_batch, compare_epoch, compare_step


@pytest.mark.parametrize(
    ("collated", "passed"),
    [
        (RowSums(2.5, 4), True),
        (RowSums(2.5 * (1 + 1e-7), 4), True),
        (RowSums(2.5, 3), False),
        (RowSums(2.4, 4), False),
    ],
)
def test_a_batch_has_the_supervised_tokens_and_the_weight_of_its_rows(collated: RowSums, passed: bool) -> None:
    check = compare_batch(RowSums(2.5, 4), collated, 7)
    assert check.passed is passed
    assert passed or "batch 7 has" in check.figure


def test_a_micro_batch_without_rows_adds_nothing() -> None:
    assert compare_batch(RowSums(), RowSums(), 1).passed
    assert compare_step(0.0, [0.0, 0.0]).passed


@pytest.mark.parametrize(("weights", "passed"), [([2.0, 3.0], True), ([2.0], False), ([2.0, 3.0, 1.0], False)])
def test_the_denominator_is_the_weight_of_all_batches_of_all_processes(weights: list[float], passed: bool) -> None:
    assert compare_step(5.0, weights).passed is passed


def test_an_epoch_that_lacks_a_supervised_token_fails() -> None:
    assert compare_epoch(10, 10).passed
    assert compare_epoch(10, 9).figure == "9 of 10 planned supervised tokens delivered"
    assert compare_epoch(10, 9).passed is False
