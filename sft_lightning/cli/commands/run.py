"""The commands that run a Lightning trainer: fit, validate, test, predict."""

from __future__ import annotations

import atexit
from collections.abc import Sequence

import torch.distributed as dist

from sft_lightning.cli.app import SFTCommandLine
from sft_lightning.cli.quiet import quiet_libraries
from sft_lightning.training.checkpoint.run_lock import unlock_run_folders


def fit(args: Sequence[str]) -> None:
    """Train a model."""
    _run_trainer("fit", args)


def validate(args: Sequence[str]) -> None:
    """Evaluate on the validation data."""
    _run_trainer("validate", args)


def test(args: Sequence[str]) -> None:
    """Evaluate on the test data."""
    _run_trainer("test", args)


def predict(args: Sequence[str]) -> None:
    """Generate answers to the records of a data file."""
    _run_trainer("predict", args)


def _run_trainer(command: str, args: Sequence[str]) -> None:
    """Run a method of the trainer as the configuration says.

    Args:
        command: fit, validate, test or predict.
        args: What follows the command on the command line.

    Raises:
        UserError: If the configuration or the data is wrong.
    """
    quiet_libraries()
    atexit.register(_leave_process_group)
    try:
        SFTCommandLine(command, list(args))
    finally:
        unlock_run_folders()


def _leave_process_group() -> None:
    """End gloo's threads before the interpreter ends, which may abort in them; Lightning does the same for NCCL."""
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
