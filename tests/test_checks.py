from __future__ import annotations

import math

import pytest

from sft_lightning.checks import Check, CheckError, CheckLog, within


@pytest.mark.parametrize(("passed", "sign"), [(True, "✓"), (False, "✗"), (None, "–")])
def test_a_line_begins_with_the_outcome(passed: bool | None, sign: str) -> None:
    assert Check("resume", passed, "the figure").line() == f"{sign} resume                     the figure"


@pytest.mark.parametrize(("value", "passed"), [(0.0, True), (1e-4, True), (1.1e-4, False), (math.nan, False)])
def test_a_value_passes_up_to_its_tolerance_and_nan_fails(value: float, passed: bool) -> None:
    check = within("export", value, 1e-4, "logits differ by")
    assert check.passed is passed
    assert check.line().endswith(f"logits differ by {value:.1e} (at most 1.0e-04)")


def test_a_check_that_fails_stops_the_run_with_its_figure_and_bound() -> None:
    log = CheckLog()
    with pytest.raises(CheckError, match=r"check failed: loss: differs by 2.0e-01 \(at most 1.0e-04\)"):
        log.run(lambda: within("loss", 0.2, 1e-4, "differs by"))
    (failed,) = log.checks
    assert failed.passed is False
    assert failed.seconds > 0


def test_a_check_that_is_made_again_keeps_its_latest_outcome_and_adds_up_its_time() -> None:
    log = CheckLog()
    log.note(Check("rows", True, "1 batch", seconds=1.0))
    log.note(Check("loss", None, "does not apply"))
    log.note(Check("rows", True, "2 batches", seconds=0.5))
    assert [check["name"] for check in log.as_dicts()] == ["rows", "loss"]
    assert log.checks[0] == Check("rows", True, "2 batches", seconds=1.5, times=2)


def test_a_check_that_fails_in_another_process_stops_this_one_with_the_same_message() -> None:
    log = CheckLog()
    log.exchange = lambda check: [check, Check(check.name, False, "of rank 1")]
    with pytest.raises(CheckError, match="check failed: loss: of rank 1"):
        log.note(Check("loss", True, "of rank 0"))
    assert log.checks[0].passed is False
