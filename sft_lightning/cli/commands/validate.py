"""Evaluate on the validation data."""

from __future__ import annotations

from collections.abc import Sequence

from sft_lightning.cli.app import run_trainer


def main(args: Sequence[str]) -> None:
    """Run `trainer.validate` as the configuration says."""
    run_trainer("validate", args)
