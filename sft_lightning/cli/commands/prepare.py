"""Tokenize the data of a configuration before training; needs no GPU and no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from sft_lightning.cli.configuration import parse_configuration
from sft_lightning.errors import UserError
from sft_lightning.terminal import make_console

if TYPE_CHECKING:
    from sft_lightning.data.datamodule import SFTDataModule


def main(args: Sequence[str]) -> None:
    """Build the token stores of a configuration, and report on its data."""
    line = parse_configuration("prepare", __doc__, args, add_options)
    prepare(line.data, rebuild=line.config["rebuild"], report=line.config["report"])


def add_options(parser: ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("--rebuild", action="store_true", help="Tokenize again, even if the tokens are already stored.")
    parser.add_argument("--report", type=str | None, default=None, help="Write the data report to this file, as JSON.")


def prepare(data: SFTDataModule, *, rebuild: bool = False, report: str | None = None) -> None:
    """Tokenize, plan and report.

    Args:
        data: The data of a run.
        rebuild: Tokenize again, even if the tokens are already stored.
        report: Write the report to this file, as JSON.

    Raises:
        UserError: If there is no source, or a source cannot be used.
    """
    from sft_lightning.views.report_table import report_tables

    stores = data.prepare(rebuild=rebuild)
    console = make_console()
    for part in report_tables(data.report):
        console.print(part, markup=False)
    for name, prepared in stores.items():
        tokens = prepared.facts["num_tokens"]
        print(f"{name}: {tokens:,} tokens in {prepared.folder}, {prepared.origin}")
    if report is not None:
        path = Path(report)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(data.report.as_dict(), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--report: cannot write {report!r}: {error.strerror}") from error
