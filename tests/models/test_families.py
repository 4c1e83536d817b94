"""Covers sft_lightning.models and sft_lightning.training: families and modes, by the script of docs/families.md."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _load(name: str) -> Any:
    sys.path.insert(0, str(_BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(_BENCHMARKS))


families: Any = _load("families")
FAMILIES: dict[str, Any] = _load("family_models").FAMILIES
MODES = list(families.MODES)
LEAKS = {"Mamba"}
"""Their state carries over from one document to the next."""

ONE_MODE_EACH = [(family, MODES[number % len(MODES)]) for number, family in enumerate(FAMILIES)]
ALL = [(family, mode) for family in FAMILIES for mode in MODES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: _load("family_models").save_family(family, root) for family in FAMILIES}


def _check(family: str, mode: str, folders: dict[str, Path], folder: Path) -> None:
    outcome = families.run(family, mode, folders[family], folder)
    assert len(outcome.losses) == 2
    assert all(math.isfinite(loss) for loss in outcome.losses)
    assert outcome.losses[1] < outcome.losses[0]
    assert outcome.changed == outcome.intended
    assert outcome.chunked_loss
    assert outcome.packing == ("none" if family in LEAKS else "best_fit")
    assert outcome.isolation.verified is (family not in LEAKS)
    if family not in LEAKS:
        assert outcome.isolation.difference < 1e-5
    assert (outcome.export_difference is None) is (mode == "full")
    if outcome.export_difference is not None:
        assert outcome.export_difference < 1e-4


@pytest.mark.parametrize(("family", "mode"), ONE_MODE_EACH)
def test_each_family_trains_packed_if_its_documents_do_not_see_each_other(
    family: str, mode: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    _check(family, mode, folders, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mode"), [pair for pair in ALL if pair not in ONE_MODE_EACH])
def test_each_family_trains_in_every_other_mode(
    family: str, mode: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    _check(family, mode, folders, tmp_path)


def test_the_guide_has_a_row_for_each_family() -> None:
    guide = (_BENCHMARKS.parent / "docs" / "families.md").read_text(encoding="utf-8")
    assert guide.startswith("# Families of models\n")
    assert [line.split("|")[1].strip() for line in guide.splitlines() if line.startswith("|")][2:] == list(FAMILIES)
