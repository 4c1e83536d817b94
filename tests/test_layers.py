"""The walls of the house: who may import whom, how large a room is. The layers are data; a broken rule is named."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted([*(ROOT / "sft_lightning").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")])

LAYERS = (
    ("sft_lightning", "sft_lightning.checks", "sft_lightning.errors", "sft_lightning.types", "sft_lightning.terminal"),
    ("sft_lightning.batch",),
    ("sft_lightning.compat",),
    ("sft_lightning.tokenizer",),
    ("sft_lightning.data.formats", "sft_lightning.data.sources"),
    ("sft_lightning.data.templates",),
    ("sft_lightning.data.tokens",),
    ("sft_lightning.data.plan",),
    ("sft_lightning.data.spec",),
    ("sft_lightning.data.batches",),
    ("sft_lightning.models.inspection", "sft_lightning.models.probing", "sft_lightning.models.checkpointing"),
    ("sft_lightning.models.attention", "sft_lightning.models.head", "sft_lightning.models.neftune"),
    ("sft_lightning.models.base", "sft_lightning.models.compiling"),
    ("sft_lightning.models.adapters",),
    ("sft_lightning.models.generation", "sft_lightning.models.export"),
    ("sft_lightning.models",),
    ("sft_lightning.data.datamodule",),
    ("sft_lightning.data.pairs",),
    ("sft_lightning.views",),
    ("sft_lightning.merging",),
    ("sft_lightning.strategies",),
    ("sft_lightning.training",),
    ("sft_lightning.estimation", "sft_lightning.comparison", "sft_lightning.migration", "sft_lightning.selftest"),
    ("callbacks",),
    ("sft_lightning.cli",),
    ("sft_lightning.__main__",),
)
"""From the ground up: a room imports what stands below it. Rooms of one line do not import each other."""

STRANGERS = {("sft_lightning.data", "sft_lightning.models"), ("sft_lightning.models", "sft_lightning.data")}
"""Folders of which the first must not import the second, wherever their rooms stand."""

TO_MEND: set[tuple[str, str]] = set()
"""Imports against the rule that are still to be mended; each goes with its mending."""

MAX_FILES, MIN_LINES, MAX_LINES = 9, 40, 300
ROOMS_OF_THEIR_OWN = {
    "sft_lightning/errors.py", "sft_lightning/terminal.py", "sft_lightning/data/templates/turn_formats.py",
}  # fmt: skip
"""Modules that are small, or long because they are data, on purpose."""

TOO_FULL: set[str] = set()
"""Folders that still have more than nine modules; each goes with its mending."""

TO_DIVIDE_OR_JOIN: set[str] = set()
"""Modules that are still too long or too short; each goes with its mending."""


def room_of(module: str) -> tuple[int, str]:
    """Return the layer and the name of a module's room: that of the longest name that matches."""
    found = [(number, room) for number, rooms in enumerate(LAYERS) for room in rooms]
    return max((room for room in found if is_in(module, room[1])), key=lambda room: len(room[1]))


def is_in(module: str, folder: str) -> bool:
    return f"{module}.".startswith(f"{folder}.")


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)


def broken_rules(path: Path, module: str) -> list[str]:
    """Return a line for each import that goes up, sideways to another room of the same layer, or to a stranger."""
    layer, room = room_of(module)
    broken = []
    for line, imported in imports_of(path):
        if imported.split(".")[0] not in ("sft_lightning", "callbacks"):
            continue
        other_layer, other_room = room_of(imported)
        goes_up = other_layer >= layer and other_room != room
        is_strange = any(is_in(module, a) and is_in(imported, b) for a, b in STRANGERS)
        if (goes_up or is_strange) and (room, other_room) not in TO_MEND:
            broken.append(f"{path}:{line}: {room} (layer {layer}) must not import {other_room} (layer {other_layer})")
    return broken


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_every_import_goes_down_the_layers() -> None:
    assert not [rule for path in MODULES for rule in broken_rules(path, module_name(path))]


def test_an_import_that_goes_up_is_named_with_its_rule(tmp_path: Path) -> None:
    file = tmp_path / "packing.py"
    file.write_text("from sft_lightning.training.module import CausalLMModule\n")
    (broken,) = broken_rules(file, "sft_lightning.data.plan.packing")
    assert "packing.py:1: sft_lightning.data.plan (layer" in broken
    assert "must not import sft_lightning.training (layer" in broken


def test_a_model_that_imports_the_data_is_named_although_it_goes_down(tmp_path: Path) -> None:
    file = tmp_path / "serving.py"
    file.write_text("from sft_lightning.data.templates.jinja import jinja_template\n")
    (broken,) = broken_rules(file, "sft_lightning.models.generation.serving")
    assert "must not import sft_lightning.data.templates" in broken


@pytest.mark.parametrize("module", ["sft_lightning", "callbacks"])
def test_no_import_is_missing_a_room(module: str) -> None:
    assert room_of(f"{module}.anything")


def test_a_folder_has_at_most_nine_modules() -> None:
    folders = {path.parent for path in MODULES}
    count = {folder: len([file for file in folder.glob("*.py") if file.stem != "__init__"]) for folder in folders}
    full = {str(folder.relative_to(ROOT)): number for folder, number in count.items() if number > MAX_FILES}
    assert not {folder: number for folder, number in full.items() if folder not in TOO_FULL}


def test_a_module_has_between_40_and_300_lines() -> None:
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in MODULES
        if path.stem not in ("__init__", "__main__")
    }
    wrong = {path: number for path, number in lines.items() if not MIN_LINES <= number <= MAX_LINES}
    assert not {p: number for p, number in wrong.items() if p not in ROOMS_OF_THEIR_OWN | TO_DIVIDE_OR_JOIN}
