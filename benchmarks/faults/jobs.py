"""Run faults, a few at a time, each in a process and a folder of its own."""

from __future__ import annotations

import compileall
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults import warm
from benchmarks.faults.faults import Fault, copy_packages, plant
from benchmarks.faults.inputs import write_families, write_inputs
from benchmarks.faults.modes import FAMILY_FOLDER
from benchmarks.faults.scenarios import Command, Scenario
from benchmarks.faults.table import Outcome, Row

COMMANDS = ("fit", "selftest")
CLEAN = "clean"


def clean_jobs(scenarios: Iterable[str]) -> list[Fault]:
    """Return a run without a fault for each scenario.

    Args:
        scenarios: Their names.
    """
    return [Fault(name=f"{CLEAN}: {name}", wrong="", scenario=name) for name in scenarios]


@dataclass(frozen=True)
class Setting:
    """What all faults have in common."""

    source: Path
    """Folder with the packages; not changed."""

    scenarios: Mapping[str, Scenario]
    """The scenarios by name."""

    commands: Sequence[str] = COMMANDS
    """`fit`, `selftest` or both."""

    limit: float = 120.0
    """Seconds for one command."""


def run_jobs(faults: Sequence[Fault], setting: Setting, *, workers: int) -> Iterator[Row]:
    """Run each fault, and yield what came of it, in the order in which they end.

    Args:
        faults: What to plant; without edits, files and options, the scenario runs as it is.
        setting: The packages, the scenarios, and what runs in them.
        workers: Processes that run faults at the same time.

    Raises:
        PlantError: If a fault cannot be planted.
    """
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        root = Path(name)
        _prepare(root, setting, faults)
        warm.warm_up()
        running: dict[int, Path] = {}
        waiting = list(enumerate(faults))
        while waiting or running:
            while waiting and len(running) < workers:
                number, fault = waiting.pop(0)
                folder = root / str(number)
                child = os.fork()
                if not child:
                    _become_job(fault, root, folder, setting)
                running[child] = folder
            child, _ = os.wait()
            folder = running.pop(child)
            yield pickle.loads((folder / "row").read_bytes())  # noqa: S301 (written by our own child)
            shutil.rmtree(folder)


def _prepare(root: Path, setting: Setting, faults: Sequence[Fault]) -> None:
    """Copy and compile the packages once, check that every fault can be planted, and write the inputs."""
    clean = root / "clean"
    for package in warm.OURS:
        shutil.copytree(setting.source / package, clean / package, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(clean / package, quiet=2)
    for fault in faults:
        probe = root / "probe"
        copy_packages(clean, probe)
        plant(fault.edits, probe, fault.name)
        shutil.rmtree(probe)
    inputs = root / "inputs"
    inputs.mkdir()
    child = os.fork()  # torch and the tokenizers stay unused in this process, which is forked again
    if not child:
        status = 1
        try:
            write_inputs(inputs)
            if any(FAMILY_FOLDER in option for fault in faults for option in setting.scenarios[fault.scenario].options):
                write_families(root / FAMILY_FOLDER)
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the inputs of the scenarios cannot be made; see above")


def _become_job(fault: Fault, root: Path, folder: Path, setting: Setting) -> None:
    """Run a fault in this forked process; does not return."""
    status = 1
    try:
        packages = folder / "packages"
        copy_packages(root / "clean", packages)
        plant(fault.edits, packages, fault.name)
        outcomes = {name: _outcome(name, fault, root, folder, setting) for name in setting.commands}
        (folder / "row").write_bytes(pickle.dumps(Row(fault, outcomes)))
        status = 0
    finally:
        os._exit(status)


def _outcome(name: str, fault: Fault, root: Path, folder: Path, setting: Setting) -> Outcome | None:
    """Run `fit` and what follows it, or `selftest`; `None` if selftest could not know of the user's change."""
    scenario = setting.scenarios[fault.scenario]
    if name == "selftest" and fault.is_users and (fault.last or fault.files):
        return None
    work = folder / name
    shutil.copytree(root / "inputs", work)
    lines = scenario.commands(fault.last) if name == "fit" else [scenario.selftest()]
    seconds = 0.0
    for number, line in enumerate(lines, start=1):
        if number == len(lines) > 1:
            for target, other in {**scenario.files, **fault.files}.items():
                shutil.copyfile(work / other, work / target)
        ended = _run(line, folder / "packages", work, setting.limit)
        seconds += ended.seconds
        if ended.status or ended.status is None:
            return Outcome(ended.status is not None, ended.message, seconds, line.args[0])
    told = next((part for part in ended.output.splitlines() if fault.says and re.search(fault.says, part)), None)
    return Outcome(told is not None, told or "", seconds, lines[-1].args[0])


def _run(line: Command, packages: Path, work: Path, limit: float) -> warm.Ended:
    return warm.run(
        line.args,
        packages=packages,
        folder=work,
        environment={"XDG_CACHE_HOME": str(work / "cache")},
        processes=line.processes,
        limit=limit,
    )
