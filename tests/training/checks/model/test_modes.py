from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sft_lightning.training.checks.model.modes import check_mode, check_repetition, compare_repetition


@pytest.mark.parametrize("training", [True, False])
def test_a_part_in_the_other_mode_is_named(training: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout()).train(training)
    assert check_mode(model, training=training).passed
    model[1].train(not training)
    check = check_mode(model, training=training)
    assert check.passed is False
    assert check.figure == f"1 parts in {'evaluation' if training else 'training'} mode: 1 …"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_validation_batch_has_the_same_loss_twice_unless_something_is_random(dropout: float) -> None:
    class Module(SimpleNamespace):
        trainer = SimpleNamespace(precision_plugin=SimpleNamespace(val_step_context=nullcontext))

        def __call__(self, batch: Any) -> tuple[torch.Tensor, ...]:
            loss = torch.nn.functional.dropout(batch, dropout).sum()
            return loss, torch.ones(()), torch.tensor(float("nan"))

    check = check_repetition(Module(), torch.arange(64.0))  # type: ignore[arg-type]
    assert check.passed is (dropout == 0.0)


@pytest.mark.parametrize(
    ("again", "exact", "passed"),
    [(50.0, True, True), (50.001, True, False), (50.001, False, True), (51.0, False, False)],
)
def test_kernels_that_add_in_another_order_are_no_randomness(again: float, exact: bool, passed: bool) -> None:
    first, second = (torch.tensor([loss, 10.0, 3.0]) for loss in (50.0, again))
    assert compare_repetition(first, second, exact=exact).passed is passed
