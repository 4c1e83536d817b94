"""Time the optimizer steps of a training run; this module runs in every environment."""

from __future__ import annotations

import time

from job import Answer, peak_memory


class StepTimes:
    """Times and losses of a training run.

    Args:
        imported: Peak memory of the process after its imports, in bytes.
    """

    def __init__(self, imported: int) -> None:
        self._imported = imported
        self._marks: list[float] = []
        self._tokens: list[int] = []
        self._losses: list[float] = []

    def start(self) -> None:
        """Record that the first step begins."""
        self._marks = [time.perf_counter()]

    def step(self, tokens: int, loss: float | None = None) -> None:
        """Record that a step has ended.

        Args:
            tokens: Tokens of the step.
            loss: Its loss, if known.
        """
        self._marks.append(time.perf_counter())
        self._tokens.append(tokens)
        if loss is not None:
            self._losses.append(loss)

    def answer(self) -> Answer:
        """Return tokens and seconds of all steps except the first, which is the warm-up."""
        return {
            "seconds": self._marks[-1] - self._marks[1],
            "tokens": sum(self._tokens[1:]),
            "steps": len(self._tokens),
            "losses": self._losses,
            "peak_bytes_above_imports": peak_memory() - self._imported,
        }
