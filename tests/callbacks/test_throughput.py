from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import Throughput, throughput
from callbacks.throughput import not_counted


class Clock:
    """The time, in seconds, which only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeRun:
    """Drives the callback as a trainer does, with batches of 100 tokens, 40 of them supervised."""

    def __init__(self, clock: Clock, *, log_every: int = 2, world_size: int = 1) -> None:
        self.clock, self.callback = clock, Throughput()
        self.trainer: Any = SimpleNamespace(
            global_step=0, log_every_n_steps=log_every, world_size=world_size, callbacks=[self.callback]
        )
        self.logged: list[dict[str, float]] = []
        self.module: Any = SimpleNamespace(device=torch.device("cpu"), log_dict=self._log)
        self.callback.on_train_start(self.trainer, self.module)

    def _log(self, values: dict[str, torch.Tensor]) -> None:
        self.logged.append({name: float(value) for name, value in values.items()})

    def step(self, *, fetch: float, compute: float, ends_step: bool = True) -> None:
        self.clock.now += fetch
        batch: Any = {"num_tokens": 100, "num_supervised": 40}
        self.callback.on_train_batch_start(self.trainer, self.module, batch, 0)
        self.clock.now += compute
        self.trainer.accumulating = not ends_step
        self.trainer.global_step += ends_step
        self.callback.on_train_batch_end(self.trainer, self.module, None, batch, 0)

    @property
    def speeds(self) -> list[float]:
        return [values["throughput/tokens_per_second"] for values in self.logged]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput.time, "perf_counter", clock)
    monkeypatch.setattr(throughput, "is_accumulating", lambda trainer: trainer.accumulating)
    return clock


def test_fetching_counts_and_an_interval_is_measured_between_logging_points(clock: Clock) -> None:
    run = FakeRun(clock)
    for fetch in (3.0, 1.0, 0.5, 0.5):
        run.step(fetch=fetch, compute=1.0)
    assert run.speeds == pytest.approx([200 / 6.0, 200 / 3.0])
    assert run.logged[0]["throughput/supervised_fraction"] == pytest.approx(0.4)


def test_all_micro_batches_of_a_step_count_over_all_devices(clock: Clock) -> None:
    run = FakeRun(clock, log_every=1, world_size=4)
    run.step(fetch=0.0, compute=1.0, ends_step=False)
    assert run.logged == []
    run.step(fetch=0.0, compute=1.0)
    assert run.speeds == pytest.approx([4 * 200 / 2.0])


def test_validation_and_samples_do_not_count(clock: Clock) -> None:
    run = FakeRun(clock)
    run.step(fetch=0.0, compute=1.0)
    run.callback.on_validation_start(run.trainer, run.module)
    clock.now += 500.0
    run.callback.on_validation_end(run.trainer, run.module)
    with not_counted(run.trainer, run.module):
        clock.now += 70.0
    run.step(fetch=0.0, compute=1.0)
    for _ in range(2):
        run.step(fetch=0.0, compute=2.0)
    assert run.speeds == pytest.approx([200 / 2.0, 200 / 4.0])


def test_samples_need_no_throughput_callback(clock: Clock) -> None:
    with not_counted(SimpleNamespace(callbacks=[]), SimpleNamespace(device=torch.device("cpu"))):  # type: ignore[arg-type]
        clock.now += 1.0


def test_nothing_is_measured_where_nothing_is_logged(clock: Clock) -> None:
    run = FakeRun(clock, log_every=0)
    run.step(fetch=0.0, compute=1.0)
    assert run.logged == []


def test_the_gpu_is_waited_for_at_logging_points_only(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    run = FakeRun(clock, log_every=3)
    run.module.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(run.trainer.global_step))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    for _ in range(6):
        run.step(fetch=0.0, compute=1.0)
    assert waited == [3, 6]
    assert run.logged[0]["memory/peak_gib"] == 3.0


def test_mfu_is_operations_over_wall_time_and_peak(fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Throughput] = []

    def as_on_a_gpu(self: Throughput, trainer: Any, module: Any) -> None:
        self.count_operations(trainer, module, peak_tflops=1e-6)
        self._start(throughput.time.perf_counter())
        found.append(self)

    monkeypatch.setattr(Throughput, "on_train_start", as_on_a_gpu)
    run = fit("--trainer.max_steps=2", "--trainer.enable_checkpointing=false")
    events = EventAccumulator(str(next(run.glob("events*")))).Reload()
    (callback,) = found
    speeds, supervised, shares = (
        [event.value for event in events.Scalars(f"throughput/{name}")]
        for name in ("tokens_per_second", "supervised_fraction", "mfu")
    )
    for speed, fraction, share in zip(speeds, supervised, shares, strict=True):
        operations = callback._operations.count(
            num_tokens=speed, num_supervised=speed * fraction, document_length=callback._document_length
        )
        assert share == pytest.approx(operations / 1e6, rel=1e-5)
    assert 20 < callback._document_length < 200
