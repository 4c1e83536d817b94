from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks.faults.faults import ROOT, Edit, PlantError, copy_packages, plant, read_faults
from benchmarks.faults.modes import MODES, family_scenarios
from benchmarks.faults.scenarios import SCENARIOS


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Two packages with one module."""
    for name in ("sft_lightning", "callbacks"):
        (tmp_path / name).mkdir()
    (tmp_path / "sft_lightning" / "step.py").write_text(
        "def step(loss):\n    if loss:\n        return loss\n    return 0\n"
    )
    return tmp_path


def test_the_lines_of_a_fault_are_indented_like_those_that_they_replace(packages: Path) -> None:
    plant([Edit("return loss", "loss = 2 * loss\nreturn loss")], packages)
    planted = (packages / "sft_lightning" / "step.py").read_text()
    assert planted == "def step(loss):\n    if loss:\n        loss = 2 * loss\n        return loss\n    return 0\n"


def test_several_lines_are_found_at_any_indentation(packages: Path) -> None:
    plant([Edit("if loss:\n    return loss", "pass")], packages)
    assert (packages / "sft_lightning" / "step.py").read_text() == "def step(loss):\n    pass\n    return 0\n"


@pytest.mark.parametrize(("search", "where"), [("no such text", "nowhere"), ("return", "sft_lightning/step.py, sft_l")])
def test_a_fault_whose_text_is_not_there_exactly_once_is_named(packages: Path, search: str, where: str) -> None:
    with pytest.raises(PlantError, match=f"double-bos: .*exactly once: '{search}' .found {where}"):
        plant([Edit(search, "pass")], packages, "double-bos")


def test_a_fault_that_is_not_python_is_named(packages: Path) -> None:
    with pytest.raises(PlantError, match=r"double-bos: sft_lightning/step.py would not be valid Python"):
        plant([Edit("return loss", "return (")], packages, "double-bos")


def test_the_original_of_a_copy_is_not_changed(packages: Path, tmp_path: Path) -> None:
    copy_packages(packages, tmp_path / "copy")
    plant([Edit("return loss", "return 1")], tmp_path / "copy")
    assert "return loss" in (packages / "sft_lightning" / "step.py").read_text()
    assert "return 1" in (tmp_path / "copy" / "sft_lightning" / "step.py").read_text()


def test_every_fault_can_be_planted_in_the_packages_as_they_are(tmp_path: Path) -> None:
    copy_packages_once = tmp_path / "packages"
    for package in ("sft_lightning", "callbacks"):
        for module in (ROOT / package).rglob("*.py"):
            target = copy_packages_once / module.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(module.read_bytes())
    for number, fault in enumerate(read_faults()):
        copy_packages(copy_packages_once, tmp_path / str(number))
        plant(fault.edits, tmp_path / str(number), fault.name)


def test_there_are_46_faults_of_the_packages_and_8_of_their_user() -> None:
    faults = read_faults()
    assert len({fault.name for fault in faults}) == len(faults)
    assert [sum(fault.is_users == users for fault in faults) for users in (False, True)] == [46, 8]
    assert {fault.scenario for fault in faults} <= set(SCENARIOS)


def test_no_two_scenarios_have_the_same_name() -> None:
    names = [*SCENARIOS, *(scenario.name for scenario in (*MODES, *family_scenarios()))]
    assert len(names) == len(set(names))


def test_faults_are_read_in_the_order_of_a_run(tmp_path: Path) -> None:
    for name in ("users", "text", "batches", "model", "training", "outputs"):
        entry = {"name": name, "wrong": "", "scenario": "packed", "edits": [{"search": "a", "replace": "b"}]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump([entry]))
    assert [fault.name for fault in read_faults(tmp_path)][:2] == ["text", "batches"]
