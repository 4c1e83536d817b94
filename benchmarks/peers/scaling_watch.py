"""Measure one process of a sharded run: when it loaded, how long its steps took, what it sent, and its memory."""

from __future__ import annotations

import gc
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

_COLLECTIVES = ("gloo:all_reduce", "c10d::_allgather_base_", "c10d::_reduce_scatter_base_")
"""Collectives by the profiler's names. Each has two names and is counted by one of them."""


def own_bytes() -> int:
    """Return the memory of this process (PSS: shared pages are divided among their processes)."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))


def live_bytes() -> int:
    """Return the bytes of all live CPU tensors, with each storage counted once."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.device.type == "cpu":
            local = each.to_local() if isinstance(each, DTensor) else each
            storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


class ScalingWatch(Callback):
    """Writes `<rank>.json` into the folder that `WATCH_FOLDER` names."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._sent: Counter[str] = Counter()
        self._marks: dict[str, float] = {}
        self._profiler: profile | None = None
        self._before = self._live = self._peak = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record the memory and the time just before the model is loaded."""
        configure_model: Any = pl_module.configure_model

        def marked() -> None:
            self._before = own_bytes()
            self._mark("empty")
            configure_model()
            self._mark("loaded")

        pl_module.configure_model = marked  # type: ignore[method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("ready")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        trainer.strategy.barrier("together")
        if trainer.global_step == trainer.max_steps - 1:  # the last step is profiled and not timed
            self._live = live_bytes()
            self._profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True)
            self._profiler.__enter__()
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seconds = time.perf_counter() - self._start
        if self._profiler is None:
            self._seconds.append(seconds)
            return
        self._profiler.__exit__(None, None, None)
        for event in self._profiler.events():
            if event.name in _COLLECTIVES:
                self._sent[event.name.rpartition(":")[2]] += largest_input(event)
        self._peak = self._live + most_allocated(self._profiler)
        self._profiler = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        answer = {
            "seconds": self._seconds,
            "bytes_by_collective": dict(self._sent),
            "marks": self._marks,
            "bytes_empty": self._before,
            "bytes_live": self._live,
            "bytes_peak": self._peak,
        }
        folder = Path(os.environ["WATCH_FOLDER"])
        (folder / f"{trainer.global_rank}.json").write_text(json.dumps(answer))

    def _mark(self, name: str) -> None:
        self._marks[name] = time.time()


def most_allocated(profiler: profile) -> int:
    """Return the most bytes that torch's allocator added during the profile."""
    kineto: Any = profiler.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def largest_input(event: Any) -> int:
    """Return the bytes of a collective's largest tensor, which is the one that is gathered, scattered or reduced."""
    sizes = [_numel(shape) for shape in event.input_shapes or [] if shape]
    return max(sizes, default=0) * torch.float32.itemsize


def _numel(shape: Any) -> int:
    """Return the number of elements of a shape, or of a list of shapes."""
    if any(isinstance(each, (list, tuple)) for each in shape):
        return sum(_numel(each) for each in shape)
    count = 1
    for each in shape:
        count *= int(each)
    return count
