from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_lightning.__main__ import main
from sft_lightning.checks import Check


@pytest.fixture
def run(model_dir: Path, alpaca_file: Path) -> Callable[..., int]:
    """Run the command on a small configuration and return its exit status."""

    def run(*options: str) -> int:
        sources = f"{{toy: {{path: {alpaca_file}, format: alpaca}}}}"
        data = [f"--data.sources={sources}", "--data.template=alpaca"]
        try:
            return main(["selftest", f"--model.model_name_or_path={model_dir}", *data, *options])
        except SystemExit as stop:
            return int(stop.code or 0)

    return run


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """Outcomes that the command is to report instead of running any check."""
    checks: list[Check] = []

    def run_checks(*args: Any, **options: Any) -> Iterator[Check]:
        yield from checks

    monkeypatch.setattr("sft_lightning.selftest.run_checks.run_checks", run_checks)
    return checks


def test_checks_that_pass_or_do_not_apply_end_with_status_0(
    run: Callable[..., int], outcomes: list[Check], capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes += [Check("resume", True, "the same bits"), Check("packing isolation", None, "no packing")]
    assert run() == 0
    out = capsys.readouterr().out
    assert "✓ resume                     the same bits" in out
    assert "– packing isolation          no packing" in out
    assert "selftest: 1 of 1 checks passed" in out


def test_a_failed_check_ends_with_status_1_and_is_named(
    run: Callable[..., int], outcomes: list[Check], capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes += [Check("resume", False, "bits differ"), Check("export", True, "equal")]
    assert run() == 1
    captured = capsys.readouterr()
    assert "selftest: 1 of 2 checks passed" in captured.out
    assert "selftest failed: resume" in captured.err


@pytest.mark.parametrize("option", ["--num_records=0", "--row_length=0"])
def test_a_number_below_one_is_a_user_error(
    option: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(option) == 2
    assert f"{option.partition('=')[0]}: must be at least 1 (got 0)" in capsys.readouterr().err
