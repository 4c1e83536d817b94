"""Evaluate on the test data."""

from __future__ import annotations

from collections.abc import Sequence

from sft_lightning.cli.app import run_trainer


def main(args: Sequence[str]) -> None:
    """Run `trainer.test` as the configuration says."""
    run_trainer("test", args)
