"""Train a model."""

from __future__ import annotations

from collections.abc import Sequence

from sft_lightning.cli.app import run_trainer


def main(args: Sequence[str]) -> None:
    """Run `trainer.fit` as the configuration says."""
    run_trainer("fit", args)
