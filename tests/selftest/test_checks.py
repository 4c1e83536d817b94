from __future__ import annotations

import math

import pytest

from sft_lightning.selftest.checks import Check, within


@pytest.mark.parametrize(("passed", "sign"), [(True, "✓"), (False, "✗"), (None, "–")])
def test_a_line_begins_with_the_outcome(passed: bool | None, sign: str) -> None:
    assert Check("resume", passed, "the figure").line() == f"{sign} resume                     the figure"


@pytest.mark.parametrize(("value", "passed"), [(0.0, True), (1e-4, True), (1.1e-4, False), (math.nan, False)])
def test_a_value_passes_up_to_its_tolerance_and_nan_fails(value: float, passed: bool) -> None:
    check = within("export", value, 1e-4, "logits differ by")
    assert check.passed is passed
    assert check.figure == f"logits differ by {value:.1e} (at most 1.0e-04)"
