"""Check masks, packing, gradients, resuming and export on your own model and data."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from sft_lightning.cli.configuration import parse_configuration
from sft_lightning.errors import UserError

if TYPE_CHECKING:
    from sft_lightning.cli.app import SFTCommandLine


def main(args: Sequence[str]) -> None:
    """Run the checks and print one line for each; exit with status 1 if one fails."""

    def configure(overrides: Sequence[str]) -> SFTCommandLine:
        return parse_configuration("selftest", __doc__, [*args, *overrides], _add_options)

    line = configure([])
    from sft_lightning.selftest.run_checks import run_checks

    num_records, row_length = line.config["num_records"], line.config["row_length"]
    for option, value in {"num_records": num_records, "row_length": row_length}.items():
        if value < 1:
            raise UserError(f"--{option}: must be at least 1 (got {value})")
    start, num_checks, failed = time.monotonic(), 0, []
    for check in run_checks(configure, line.data, num_records=num_records, max_row_length=row_length):
        print(check.line(), flush=True)
        num_checks += check.passed is not None
        if check.passed is False:
            failed.append(check.name)
    seconds = time.monotonic() - start
    print(f"selftest: {num_checks - len(failed)} of {num_checks} checks passed in {seconds:.0f} s")
    if failed:
        print(f"selftest failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--num_records", type=int, default=32, help="Records per source whose masks are checked.")
    parser.add_argument("--row_length", type=int, default=512, help="Most tokens per row in the short runs.")
