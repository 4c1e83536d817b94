from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.errors import UserError

STREAMED = {"toy": SourceConfig(path="toy.json", streaming=True)}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch_size": 0}, r"^data\.batch_size: must be at least 1 \(got 0\)"),
        ({"max_length": -5}, r"^data\.max_length: must be at least 1 \(got -5\)"),
        ({"val_fraction": -0.1}, r"^data\.val_fraction: must be in \[0, 1\) \(got -0\.1\)"),
        ({"val_fraction": 0.1, "val_sources": {"a": SourceConfig(path="x")}}, r"not both \(got \['a'\] and 0\.1\)"),
        ({"data_split": "2,x"}, r"^data\.data_split: '2,x' is not a list of proportions"),
        ({"data_split_part": 1}, r"^data\.data_split_part: 1, but data\.data_split is not set"),
    ],
)
def test_a_value_out_of_range_or_a_contradiction_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataSpec(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"val_fraction": 0.1},
            r"^data\.val_fraction: 0\.1 cannot be combined .* use data\.val_sources",
        ),
        ({"data_split": "2,8"}, r"^data\.data_split: '2,8' cannot be combined with data\.sources\.toy\.streaming"),
        ({"val_sources": STREAMED}, r"^data\.val_sources\.toy\.streaming: true"),
        ({"test_sources": STREAMED}, r"^data\.test_sources\.toy\.streaming: true"),
        (
            {"sources": {"a": SourceConfig(path="x", streaming=True, max_epochs=2.0)}},
            r"^data\.sources\.a\.max_epochs: 2\.0",
        ),
    ],
)
def test_keys_that_need_the_number_of_records_are_refused_with_streamed_sources(
    keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        DataSpec(**{"sources": STREAMED, **keys})


def test_if_one_training_source_is_streamed_all_are() -> None:
    plain = {"plain": SourceConfig(path="plain.json")}
    assert not DataSpec(sources=plain).streams
    assert DataSpec(sources={**plain, **STREAMED}).streams


def test_a_split_without_sources_has_none() -> None:
    spec = DataSpec(sources={"toy": SourceConfig(path="toy.json")})
    assert list(spec.sources_of("train")) == ["toy"]
    assert {split: list(sources) for split, sources in spec.splits.items()} == {
        "train": ["toy"], "val": [], "test": [], "predict": [],
    }  # fmt: skip


def test_the_store_folder_is_the_users_cache_unless_the_yaml_names_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DataSpec().store_folder == tmp_path / "sft_lightning" / "stores"
    assert DataSpec(store_dir="~/stores").store_folder == Path.home() / "stores"


def test_a_spec_is_frozen_and_a_changed_copy_is_checked_again() -> None:
    spec = DataSpec()
    with pytest.raises(FrozenInstanceError):
        spec.max_length = 5  # type: ignore[misc]
    with pytest.raises(UserError, match=r"data\.max_length"):
        replace(spec, max_length=0)
