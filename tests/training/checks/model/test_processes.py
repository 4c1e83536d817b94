from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sft_lightning.training.checks.model import processes
from sft_lightning.training.checks.model.processes import SameWeights, check_weights


def beside(monkeypatch: pytest.MonkeyPatch, *others: list[int]) -> None:
    """Pretend that there are other processes, which have these sums."""
    monkeypatch.setattr(processes, "values_of_processes", lambda own: [own, *others])


def test_equal_weights_pass_and_a_changed_bit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    sums = [int(processes.bit_sum(parameter)) for parameter in model.parameters()]
    beside(monkeypatch, sums)
    assert check_weights(model).passed
    beside(monkeypatch, sums, [sums[0], sums[1] + 1])
    check = check_weights(model)
    assert check.passed is False
    assert check.figure == "1 of 2 trained tensors differ between 3 processes: bias …"


def test_frozen_weights_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    beside(monkeypatch, [])
    assert check_weights(model).passed


@pytest.mark.parametrize(("sharded", "figure"), [(False, "one process"), (True, "each process has its own part")])
def test_one_process_and_sharded_weights_have_nothing_to_compare(
    sharded: bool, figure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "is_sharded", lambda model: sharded)
    check = check_weights(torch.nn.Linear(2, 2))
    assert check.passed is None
    assert check.figure.startswith(figure)


def test_weights_are_compared_after_the_first_whole_step_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    accumulating = iter((True, False, False))
    monkeypatch.setattr(processes, "is_accumulating", lambda trainer: next(accumulating))
    log = SimpleNamespace(run=lambda make: made.append(""))
    module: Any = SimpleNamespace(trainer=None, checks=log)
    check = SameWeights()
    for index in range(3):
        check.on_train_batch_end(module, None, index)
    assert len(made) == 1
    check.on_train_end(module)
    assert len(made) == 2
