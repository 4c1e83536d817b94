"""Data modules of conversations with two rounds, or of other records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.pairs.kind import Pairs
from sft_lightning.data.pairs.spec import PairDataSpec
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec

MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": f"Name {n}"},
            {"role": "assistant", "content": "red " * n},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": f"blue {n}"},
        ]
    }
    for n in range(1, 7)
]


@pytest.fixture
def make_data(tmp_path: Path, model_dir: Path) -> Callable[..., SFTDataModule]:
    def make(records: Any = None, **changes: Any) -> SFTDataModule:
        path = tmp_path / "records.json"
        path.write_text(json.dumps(records or MESSAGES))
        options: dict[str, Any] = {
            "sources": {"toy": SourceConfig(path=str(path))},
            "template": "vicuna_v1.1",
            "max_length": 256,
            "batch_size": 3,
            "tokenizer_name_or_path": str(model_dir),
            "store_dir": str(tmp_path / "stores"),
            **changes,
        }
        data = (
            SFTDataModule(PairDataSpec(**options), Pairs)
            if records and "chosen" in records[0]
            else SFTDataModule(DataSpec(**options))
        )
        data.setup("fit")
        return data

    return make
