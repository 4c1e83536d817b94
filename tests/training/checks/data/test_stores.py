from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.training.checks.data import stores
from sft_lightning.training.checks.data.stores import check_found_stores, is_quick_to_read


def test_a_store_that_was_built_in_this_run_is_not_compared(make_data: Callable[..., SFTDataModule]) -> None:
    check = check_found_stores(make_data())
    assert (check.passed, check.figure) == (None, "0 found, 0 of them compared with their first 8 records")


def test_a_store_that_is_found_has_the_tokens_of_its_records(make_data: Callable[..., SFTDataModule]) -> None:
    make_data()
    assert check_found_stores(make_data()).passed


@pytest.mark.parametrize("column", ["input_ids", "loss_weights"])
def test_a_stale_store_is_named(column: str, make_data: Callable[..., SFTDataModule]) -> None:
    make_data()
    data = make_data()
    [config] = data.spec.sources_of("train").values()
    prepared = data.reader.prepare("train", "toy")
    other = replace(prepared.store, **{column: np.roll(getattr(prepared.store, column), 1)})
    data.reader._prepared[id(config)] = replace(prepared, store=other)
    check = check_found_stores(data)
    assert check.passed is False
    assert str(prepared.folder) in check.figure


def test_a_large_json_file_and_the_hub_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.json", "b.jsonl"):
        (tmp_path / name).write_text("[{}]")
    monkeypatch.setattr(stores, "_LARGEST_JSON", 1)
    quick = [is_quick_to_read("toy", SourceConfig(path=str(tmp_path / name))) for name in ("a.json", "b.jsonl")]
    assert quick == [False, True]
    assert not is_quick_to_read("toy", SourceConfig(path="someone/data"))
