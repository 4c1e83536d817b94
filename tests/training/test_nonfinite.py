from __future__ import annotations

import pytest
import torch

from sft_lightning.training.loss_scale import LossScale
from sft_lightning.training.nonfinite import NonfiniteLosses, nonfinite_error

NAN, INF = float("nan"), float("inf")


def found(limit: int | None, losses: list[float]) -> int:
    counter = NonfiniteLosses(limit)
    for step, loss in enumerate(losses, start=1):
        counter.note(torch.tensor(loss), step)
    return int(counter.found)


@pytest.mark.parametrize(
    ("limit", "losses", "step"),
    [
        (2, [1.0, NAN, 1.0, NAN, 1.0], 0),
        (2, [1.0, NAN, INF, 1.0], 3),
        (2, [NAN, -INF, NAN, NAN], 2),
        (1, [1.0, 1.0, INF], 3),
        (None, [NAN] * 100, 0),
        (3, [], 0),
    ],
)
def test_the_step_is_found_at_which_too_many_losses_in_a_row_are_not_finite(
    limit: int | None, losses: list[float], step: int
) -> None:
    assert found(limit, losses) == step


def test_the_error_names_the_step_and_the_records() -> None:
    error = nonfinite_error(5, 12, ["a.json, record 3 (toy)", "and 2 more records"])
    assert "step 12, which trained on a.json, record 3 (toy); and 2 more records" in str(error)
    assert "before step 8" in str(error)


class FakeScaler:
    """What `torch.amp.GradScaler` has of a scale: a tensor changed in place, and none before the first step."""

    def __init__(self, initial: float) -> None:
        self._init_scale = initial
        self._scale: torch.Tensor | None = None

    def update(self, scale: float) -> None:
        if self._scale is None:
            self._scale = torch.tensor(self._init_scale)
        self._scale.fill_(scale)


def test_overflows_are_the_steps_at_which_the_scale_fell() -> None:
    scaler, watcher = FakeScaler(65536.0), LossScale()
    assert watcher.note(scaler) == {}
    seen = []
    for scale in (32768.0, 32768.0, 16384.0, 32768.0):
        scaler.update(scale)
        seen.append({name: float(value) for name, value in watcher.note(scaler).items()})
    assert [each["train/loss_scale"] for each in seen] == [32768.0, 32768.0, 16384.0, 32768.0]
    assert [each["train/loss_scale_overflows"] for each in seen] == [1.0, 1.0, 2.0, 2.0]
