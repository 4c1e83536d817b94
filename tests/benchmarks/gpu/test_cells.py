from __future__ import annotations

import itertools

import pytest

from benchmarks.gpu.cells import CELLS, cells_named
from benchmarks.gpu.inputs import SHAPES


def test_names_are_unique_and_groups_stand_together() -> None:
    names = [cell.name for cell in CELLS]
    assert len(set(names)) == len(names)
    groups = [group for group, _ in itertools.groupby(CELLS, key=lambda cell: cell.group)]
    assert len(set(groups)) == len(groups)
    assert not {*groups} & {*names}


def test_shapes_exist_and_goals_are_figures_or_other_cells() -> None:
    names = {cell.name for cell in CELLS}
    for cell in CELLS:
        assert cell.shape in SHAPES
        assert set(cell.goal) <= names | {"tokens_per_second", "peak_gib"}


def test_cells_are_found_by_name_and_by_group_in_the_order_of_the_table() -> None:
    assert cells_named([]) == list(CELLS)
    found = [cell.name for cell in cells_named(["qlora", "ceiling-copy"])]
    assert found == ["ceiling-copy", "qlora-4k", "qlora-16k"]
    with pytest.raises(SystemExit, match="no cell or group is named quick; there are: ceiling-attention"):
        cells_named(["quick"])
