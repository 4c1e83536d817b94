"""Covers pyproject.toml, constraints.txt and constraints-oldest.txt: what is allowed is what is tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LIBRARIES = ("bitsandbytes", "datasets", "deepspeed", "jsonargparse", "lightning", "peft", "torch", "transformers")


def allowed() -> dict[str, Requirement]:
    project: dict[str, Any] = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], project["optional-dependencies"]["deepspeed"][0]]
    return {canonicalize_name(found.name): found for found in map(Requirement, lines)}


def pinned(file: str) -> dict[str, Requirement]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(each.name): each for each in found if each.marker is None or each.marker.evaluate()}


def version_of(requirement: Requirement) -> Version:
    (pin,) = requirement.specifier
    return Version(pin.version)


def test_the_oldest_versions_that_are_tried_are_the_lower_bounds() -> None:
    lower = {
        name: Version(bound.version)
        for name, requirement in allowed().items()
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    assert {name: version_of(pin) for name, pin in pinned("constraints-oldest.txt").items()} == lower


def test_the_versions_that_make_setup_installs_are_allowed() -> None:
    newest = pinned("constraints.txt")
    assert not [name for name, bound in allowed().items() if version_of(newest[name]) not in bound.specifier]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_whose_undocumented_names_are_used_has_an_upper_bound(library: str) -> None:
    assert any(bound.operator == "<" for bound in allowed()[library].specifier)
