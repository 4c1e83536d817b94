from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import clock as module
from benchmarks.gpu.clock import StepClock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds; a test moves it."""
    time = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: time[0])
    return time


def run(now: list[float], durations: list[float], *, warmup: int = 1) -> StepClock:
    clock = StepClock(torch.device("cpu"), warmup=warmup, steps=len(durations) - warmup)
    clock.start()
    for index, seconds in enumerate(durations):
        now[0] += seconds
        clock.step(100, torch.tensor(float(index)), torch.tensor(0.5))
    return clock


def test_the_first_steps_are_not_timed(now: list[float]) -> None:
    found = run(now, [50.0, 2.0, 3.0]).answer()
    assert found["tokens_per_second"] == 200 / 5.0
    assert found["seconds_per_step"] == 2.5
    assert found["seconds_of_warmup"] == 50.0
    assert found["losses"] == [0.0, 1.0, 2.0]
    assert found["grad_norms"] == [0.5] * 3


def test_a_loss_that_is_changed_in_place_later_is_kept(now: list[float]) -> None:
    clock, loss = StepClock(torch.device("cpu"), warmup=1, steps=1), torch.tensor(1.0)
    clock.start()
    for _ in range(2):
        now[0] += 1.0
        clock.step(10, loss, None)
        loss += 1.0
    assert clock.answer()["losses"] == [1.0, 2.0]
    assert clock.answer()["grad_norms"] == []


def test_a_cell_that_ended_early_has_no_result(now: list[float]) -> None:
    clock = StepClock(torch.device("cpu"), warmup=1, steps=3)
    clock.start()
    clock.step(1, torch.tensor(1.0), None)
    with pytest.raises(RuntimeError, match="expected 4 optimizer steps, ran 1"):
        clock.answer()
