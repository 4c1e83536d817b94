"""Time the optimizer steps of a cell: by the wall between two moments when the device is idle, and by CUDA events."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

Answer = dict[str, Any]


class StepClock:
    """Times, losses, gradient norms and peak memory of a cell.

    Only the first and the last moment of the timed steps wait for the device, so everything between them counts:
    fetching, copying, callbacks.

    Args:
        device: The device that trains.
        warmup: Steps before the timed ones.
        steps: Timed steps.
    """

    def __init__(self, device: torch.device, *, warmup: int, steps: int) -> None:
        self.device, self.warmup, self.steps = device, warmup, steps
        self._tokens: list[int] = []
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._events: list[Any] = []
        self._began = self._ended = self._first = 0.0

    @property
    def total(self) -> int:
        """All steps."""
        return self.warmup + self.steps

    def start(self) -> None:
        """Record that the first step begins; memory counts from here."""
        self._first = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def step(self, tokens: int, loss: torch.Tensor, norm: torch.Tensor | None) -> None:
        """Record that an optimizer step has ended.

        Args:
            tokens: Its tokens, without padding.
            loss: Its loss, a scalar; read at the end.
            norm: The norm of its gradients before clipping, a scalar; read at the end. `None` if it is unknown.
        """
        self._tokens.append(tokens)
        self._losses.append(loss.detach().clone())
        if norm is not None:
            self._norms.append(norm.detach().clone())
        done = len(self._tokens)
        if done == self.warmup:
            self._began = self._idle()
        if self.device.type == "cuda" and done >= self.warmup:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        if done == self.total:
            self._ended = self._idle()

    def _idle(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def answer(self) -> Answer:
        """Return the results.

        Raises:
            RuntimeError: If not all steps were run.
        """
        if len(self._tokens) != self.total:
            raise RuntimeError(f"expected {self.total} optimizer steps, ran {len(self._tokens)}")
        tokens, seconds = sum(self._tokens[self.warmup :]), self._ended - self._began
        answer: Answer = {
            "tokens_per_second": tokens / seconds,
            "seconds_per_step": seconds / self.steps,
            "tokens_per_step": tokens / self.steps,
            "seconds_of_warmup": self._began - self._first,
            "losses": [float(loss) for loss in self._losses],
            "grad_norms": [float(norm) for norm in self._norms],
        }
        if self._events:
            pairs = zip(self._events, self._events[1:], strict=False)
            answer["median_event_seconds"] = statistics.median(one.elapsed_time(other) / 1e3 for one, other in pairs)
            answer["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            answer["peak_reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / 2**30
        return answer
