"""Train with `python -m sft_lightning fit` as users do, with all default callbacks."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from job import Answer, Job, peak_memory, run, versions
from step_times import StepTimes
from watch import Watch

from sft_lightning.cli.app import SFTCommandLine
from sft_lightning.cli.quiet import quiet_libraries


def measure(job: Job) -> Answer:
    """Train with the job's `config`."""
    torch.set_num_threads(job["threads"])
    Watch.times = StepTimes(peak_memory())
    quiet_libraries()
    with contextlib.redirect_stdout(io.StringIO()):
        SFTCommandLine("fit", ["--config", str(Path(job["config"]))])
    return {**Watch.times.answer(), "versions": versions("sft-lightning", "torch", "transformers", "lightning")}


if __name__ == "__main__":
    run(measure)
