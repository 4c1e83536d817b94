"""Faults as data: what is changed in a copy of the packages, or by the user, and the scenario in which it must show."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.faults.warm import OURS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "faults"
"""One YAML file for each stage of a run; each has a list of faults."""


class PlantError(ValueError):
    """A fault cannot be planted, because its text is not found exactly once, or what it makes is not Python."""


@dataclass(frozen=True)
class Edit:
    """A change of the source code; it names no module and no indentation, so that it survives moves."""

    search: str
    """Text that one module of the packages has, once; lines after the first are found with any indentation."""

    replace: str
    """What stands there instead; lines after the first are indented like the line that is replaced."""

    def matches(self, text: str) -> list[re.Match[str]]:
        """Return where the text is found."""
        return list(re.finditer(r"\n *".join(map(re.escape, self.search.splitlines())), text))

    def apply(self, match: re.Match[str]) -> str:
        """Return the whole text with the change.

        Args:
            match: One of `matches`.
        """
        text = match.string
        line = text[text.rfind("\n", 0, match.start()) + 1 :]
        indent = line[: len(line) - len(line.lstrip(" "))]
        return text[: match.start()] + f"\n{indent}".join(self.replace.splitlines()) + text[match.end() :]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong."""

    name: str
    """Its name on the command line."""

    wrong: str
    """What is wrong, in one line."""

    scenario: str
    """The scenario in which it must show."""

    edits: tuple[Edit, ...] = ()
    """Changes of the packages; none for a change on the user's side."""

    files: dict[str, str] = field(default_factory=dict)
    """File of the inputs → the one that replaces it before the last command."""

    last: tuple[str, ...] = ()
    """More options of the last command."""

    says: str | None = None
    """A change that is allowed, but only if the output says so: a pattern of that line."""

    @property
    def is_users(self) -> bool:
        """Whether the user changes something between two commands, and the packages are without a fault."""
        return not self.edits


def read_faults(folder: Path = FOLDER) -> list[Fault]:
    """Return all faults, in the order of the files.

    Args:
        folder: Folder of the YAML files.
    """
    names = ("text", "batches", "model", "training", "outputs", "users")
    return [_fault(entry) for name in names for entry in yaml.safe_load((folder / f"{name}.yaml").read_text("utf-8"))]


def _fault(entry: dict[str, Any]) -> Fault:
    edits = tuple(Edit(**edit) for edit in entry.pop("edits", ()))
    return Fault(edits=edits, last=tuple(entry.pop("last", ())), **entry)


def copy_packages(source: Path, target: Path) -> None:
    """Copy the packages; the files are hard links, so that this takes milliseconds.

    Args:
        source: Folder with the packages.
        target: Folder to copy them into.
    """
    for name in OURS:
        shutil.copytree(source / name, target / name, copy_function=os.link)


def plant(edits: Sequence[Edit], packages: Path, name: str = "fault") -> None:
    """Change a copy of the packages.

    Args:
        edits: The changes.
        packages: Folder with the copy.
        name: Name of the fault, for errors.

    Raises:
        PlantError: If a text is not found exactly once, or the changed module is not valid Python.
    """
    for edit in edits:
        modules = [path for package in OURS for path in sorted((packages / package).rglob("*.py"))]
        found = [(path, match) for path in modules for match in edit.matches(path.read_text(encoding="utf-8"))]
        if len(found) != 1:
            where = ", ".join(str(path.relative_to(packages)) for path, _ in found) or "nowhere"
            raise PlantError(f"{name}: must be in the packages exactly once: {edit.search!r} (found {where})")
        path, match = found[0]
        changed = edit.apply(match)
        try:
            compile(changed, str(path), "exec")
        except SyntaxError as error:
            raise PlantError(f"{name}: {path.relative_to(packages)} would not be valid Python: {error}") from error
        path.unlink()  # a link to the original
        path.write_text(changed, encoding="utf-8")
