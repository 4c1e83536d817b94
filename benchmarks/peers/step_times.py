"""When each optimizer step of a training began, and what the whole took; runs in every environment."""

from __future__ import annotations

import time

from job import Answer, peak_memory


class StepTimes:
    """Marks of a training's steps.

    Args:
        imported: Peak memory of the process before it did anything, in bytes.
    """

    def __init__(self, imported: int) -> None:
        self._imported = imported
        self._marks: list[float] = []
        self._tokens: list[int] = []
        self._losses: list[float] = []

    def start(self) -> None:
        """Note that the first step begins."""
        self._marks = [time.perf_counter()]

    def step(self, tokens: int, loss: float | None = None) -> None:
        """Note that a step on `tokens` tokens has ended."""
        self._marks.append(time.perf_counter())
        self._tokens.append(tokens)
        if loss is not None:
            self._losses.append(loss)

    def answer(self) -> Answer:
        """Return tokens and seconds of all steps but the first, which warms up."""
        return {
            "seconds": self._marks[-1] - self._marks[1],
            "tokens": sum(self._tokens[1:]),
            "steps": len(self._tokens),
            "losses": self._losses,
            "peak_bytes_above_imports": peak_memory() - self._imported,
        }
