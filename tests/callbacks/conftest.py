from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sft_lightning.__main__ import main


@pytest.fixture
def fit(fit_args: list[str], tmp_path: Path) -> Callable[..., Path]:
    """Run `fit` with further options, and return the run's folder."""

    def run(*options: str) -> Path:
        assert main(["fit", *fit_args, *options]) == 0
        return tmp_path / "run"

    return run
