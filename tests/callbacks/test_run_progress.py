from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def test_a_file_gets_lines_instead_of_a_bar(fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    fit("--data.val_fraction=0.2")
    captured = capsys.readouterr()
    assert "\r" not in captured.out + captured.err
    [line] = [line for line in captured.out.splitlines() if line.startswith("trained ")]
    assert "loss" in line
    assert "tokens/s" in line
