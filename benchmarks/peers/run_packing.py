"""Run `best_fit` on a million Alpaca-like lengths."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from job import Answer, Job, run, seconds_of, versions

from sft_lightning.data.plan.packing import Rows, best_fit
from sft_lightning.types import Longs


def measure(job: Job) -> Answer:
    """Pack `num` lengths, in tokens, to `max_length`.

    Alpaca rendered for Qwen2.5 has about 32 tokens of template and question, and answers of log-normal lengths. Many
    examples have the same length, which `best_fit` exploits.
    """
    generator = np.random.default_rng(job["seed"])
    answers: npt.NDArray[np.float64] = generator.lognormal(3.6, 1.05, size=int(job["num"]))
    lengths = (32 + answers).astype(np.int64).clip(33, job["max_length"])
    seconds, rows = seconds_of(lambda: best_fit(lengths, job["max_length"]))
    _check(rows, lengths, job["max_length"])
    return {
        "seconds": seconds,
        "examples_per_second": len(lengths) / seconds,
        "fill": float(lengths.sum() / (len(rows) * job["max_length"])),
        "versions": versions("numpy"),
    }


def _check(rows: Rows, lengths: Longs, max_length: int) -> None:
    """Check that the result is a valid packing."""
    examples, starts, stops = rows.documents.T
    whole = not starts.any() and np.array_equal(stops, lengths[examples])
    once = np.array_equal(np.sort(examples), np.arange(len(lengths)))
    if not (whole and once and rows.lengths.max() <= max_length):
        raise ValueError("best_fit lost, repeated or cut an example, or made a row too long")


if __name__ == "__main__":
    run(measure)
