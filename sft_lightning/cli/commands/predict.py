"""Generate answers to the records of a data file."""

from __future__ import annotations

from collections.abc import Sequence

from sft_lightning.cli.app import run_trainer


def main(args: Sequence[str]) -> None:
    """Run `trainer.predict` as the configuration says."""
    run_trainer("predict", args)
