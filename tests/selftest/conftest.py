"""A data module on a few records of a tiny model's tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec


@pytest.fixture
def make_data(model_dir: Path, alpaca_file: Path, tmp_path: Path) -> Callable[..., SFTDataModule]:
    """Return a function that makes the data of a run, with further keys."""

    def make(**keys: Any) -> SFTDataModule:
        options: dict[str, Any] = {
            "sources": {"toy": SourceConfig(path=str(alpaca_file))},
            "template": "alpaca",
            "max_length": 256,
            "tokenizer_name_or_path": str(model_dir),
            "store_dir": str(tmp_path / "stores"),
        }
        return SFTDataModule(DataSpec(**{**options, **keys}))

    return make
