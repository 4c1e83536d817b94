from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.mark.parametrize(("every", "logged"), [(3, [0, 2, 5]), (0, [])])
def test_the_first_step_is_logged_in_addition_to_the_interval(
    every: int, logged: list[int], fit: Callable[..., Path]
) -> None:
    run = fit("--trainer.max_steps=7", f"--trainer.log_every_n_steps={every}", "--trainer.accumulate_grad_batches=2")
    events = EventAccumulator(str(next(run.glob("events*")))).Reload()
    for tag in ("train/loss", "train/lr", "train/grad_norm", "throughput/tokens_per_second"):
        found = [event.step for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []
        assert found == logged
