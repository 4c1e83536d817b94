from __future__ import annotations

import pytest
import torch

from sft_lightning.errors import UserError
from sft_lightning.training.step import LossScale, NonfiniteLosses, StepShare, StepSums, nonfinite_error

NAN, INF = float("nan"), float("inf")


def test_the_shares_of_a_step_add_up_without_a_graph_until_it_is_cleared() -> None:
    step = StepSums()
    for loss in (1.0, 2.0):
        step.add(StepShare(torch.tensor(loss, requires_grad=True), torch.tensor([loss, 0.5])))
    assert step.loss is not None
    assert step.means is not None
    assert (float(step.loss), step.loss.requires_grad, step.means.tolist()) == (3.0, False, [3.0, 1.0])
    step.clear()
    assert step.loss is None
    assert step.means is None


def check(limit: int | None, losses: list[float]) -> None:
    counter = NonfiniteLosses(limit)
    for step, loss in enumerate(losses, start=1):
        counter.note(torch.tensor(loss), step)
    counter.check(lambda step: step, lambda step: [f"row {step}"])


@pytest.mark.parametrize(
    ("limit", "losses", "step"),
    [
        (2, [1.0, NAN, INF, 1.0], 3),
        (2, [NAN, -INF, NAN, NAN], 2),
        (1, [1.0, 1.0, INF], 3),
    ],
)
def test_too_many_nonfinite_losses_in_a_row_stop_the_run_with_the_step(
    limit: int, losses: list[float], step: int
) -> None:
    with pytest.raises(
        UserError, match=rf"in {limit} optimizer steps in a row; the last one, step {step}, .*row {step}"
    ):
        check(limit, losses)


@pytest.mark.parametrize(
    ("limit", "losses"), [(2, [1.0, NAN, 1.0, NAN, 1.0]), (None, [NAN] * 100), (3, []), (3, [NAN, NAN])]
)
def test_fewer_nonfinite_losses_or_no_limit_let_the_run_continue(limit: int | None, losses: list[float]) -> None:
    check(limit, losses)


def test_a_limit_reached_on_another_rank_stops_this_rank_too() -> None:
    with pytest.raises(UserError, match="step 7"):
        NonfiniteLosses(5).check(lambda step: torch.tensor(7), lambda step: [])


def test_the_error_of_nonfinite_losses_names_the_step_and_the_records() -> None:
    error = nonfinite_error(5, 12, ["a.json, record 3 (toy)", "and 2 more records"])
    assert "step 12, trained on a.json, record 3 (toy); and 2 more records" in str(error)
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


def test_each_fall_of_the_loss_scale_counts_as_an_overflow() -> None:
    scaler, watcher = FakeScaler(65536.0), LossScale()
    assert watcher.note(scaler) == {}
    seen = []
    for scale in (32768.0, 32768.0, 16384.0, 32768.0):
        scaler.update(scale)
        seen.append({name: float(value) for name, value in watcher.note(scaler).items()})
    assert [each["train/loss_scale"] for each in seen] == [32768.0, 32768.0, 16384.0, 32768.0]
    assert [each["train/loss_scale_overflows"] for each in seen] == [1.0, 1.0, 2.0, 2.0]
