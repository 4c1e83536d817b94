"""Plant one fault at a time in a copy of the packages, and see whether `fit` or `selftest` notices it.

    python -m benchmarks.faults [--only NAME …] [--scenario NAME …] [--commands fit] [--workers 2] [--json FILE]
    python -m benchmarks.faults --list

The faults are in `tests/faults/`. `fit` stands for all that a user runs: training, and where the fault is in them,
continuing, merging, or training on edited data. A fault is noticed if a command ends with an error; one that is still
running after the limit is not. First, each scenario runs without a fault: an error there is a false alarm. The exit
status is 1 if any fault passes both commands, or if there is a false alarm. `--only clean --families` looks for false
alarms in the other modes and in all families of models (ten minutes).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.faults.faults import ROOT, Fault, read_faults
from benchmarks.faults.jobs import CLEAN, COMMANDS, Setting, clean_jobs, run_jobs
from benchmarks.faults.modes import MODES, family_scenarios
from benchmarks.faults.scenarios import SCENARIOS, Scenario
from benchmarks.faults.table import Row, print_table, write_json


def main() -> int:
    """Run the faults that were asked for, and print the table."""
    args = _parser().parse_args()
    faults = [each for each in read_faults() if _is_wanted(each, args.only, args.scenario)]
    if args.only and (unknown := sorted(set(args.only) - {each.name for each in faults} - {CLEAN})):
        print(f"error: --only: no such fault: {', '.join(unknown)}; --list shows all", file=sys.stderr)
        return 2
    if args.list:
        for each in faults:
            print(f"{each.name:<36} {each.scenario:<18} {each.wrong}")
        return 0
    clean = [] if args.only and CLEAN not in args.only else args.scenario or _clean_scenarios(args.families)
    jobs = [*clean_jobs(clean), *faults]
    setting = Setting(ROOT, _scenarios(), args.commands, args.limit)
    found: dict[str, Row] = {}
    for row in run_jobs(jobs, setting, workers=args.workers):
        found[row.fault.name] = row
        print(row.line(), flush=True)
    rows = [found[job.name] for job in jobs]
    print_table(rows, sys.stdout)
    if args.json is not None:
        write_json(rows, args.json)
    return int(any(row.is_bad for row in rows))


def _scenarios() -> dict[str, Scenario]:
    return {**SCENARIOS, **{each.name: each for each in (*MODES, *family_scenarios())}}


def _clean_scenarios(families: bool) -> list[str]:
    return list(_scenarios()) if families else list(SCENARIOS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these faults; clean: the scenarios without one")
    parser.add_argument("--scenario", nargs="+", metavar="NAME", help="only these scenarios, with and without faults")
    parser.add_argument(
        "--families", action="store_true", help="without faults, run the other modes and each family of models, too"
    )
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="only this command")
    parser.add_argument("--list", action="store_true", help="list the faults and exit")
    parser.add_argument("--workers", type=int, default=2, help="faults that run at the same time (default: 2)")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one command (default: 120)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file, too")
    return parser


def _is_wanted(fault: Fault, only: list[str] | None, scenarios: list[str] | None) -> bool:
    return (not only or fault.name in only) and (not scenarios or fault.scenario in scenarios)


if __name__ == "__main__":
    sys.exit(main())
