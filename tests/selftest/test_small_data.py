from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.errors import UserError
from sft_lightning.selftest.small_data import small_data

Make = Callable[..., SFTDataModule]


def test_an_epoch_has_about_four_short_rows(make_data: Make, tmp_path: Path) -> None:
    small = small_data(make_data(max_length=4096), tmp_path, max_row_length=2048)
    assert small.row_length < 2048
    assert 4 <= small.num_rows("best_fit") <= 5
    assert small.num_rows("none") == 16


def test_rows_are_no_longer_than_asked_for(make_data: Make, tmp_path: Path) -> None:
    small = small_data(make_data(), tmp_path, max_row_length=220)
    assert small.row_length == 220
    data = small.module(batch_size=1, packing="best_fit")
    data.setup("fit")
    assert all(batch["input_ids"].shape[1] <= 220 for batch in data.train_dataloader())


def test_several_sources_share_the_examples(make_data: Make, alpaca_file: Path, tmp_path: Path) -> None:
    sources = {name: SourceConfig(path=str(alpaca_file), weight=3.0) for name in ("one", "two", "three", "four")}
    small = small_data(make_data(sources=sources), tmp_path, max_row_length=512)
    assert [source.max_examples for source in small.sources.values()] == [4] * 4
    assert [source.weight for source in small.sources.values()] == [1.0] * 4


def test_the_first_records_of_a_stream_are_written_to_a_file(
    make_data: Make, alpaca_file: Path, tmp_path: Path
) -> None:
    source = SourceConfig(path=str(alpaca_file), streaming=True)
    small = small_data(make_data(sources={"toy": source}, packing="none"), tmp_path, max_row_length=512)
    assert not small.sources["toy"].streaming
    assert len(Path(small.sources["toy"].path).read_text().splitlines()) == 16


def test_data_without_sources_is_refused(make_data: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.sources: selftest needs at least one source"):
        small_data(make_data(sources=None), tmp_path, max_row_length=512)


def test_a_stream_without_records_is_refused(make_data: Make, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("[]")
    source = SourceConfig(path=str(tmp_path / "empty.json"), streaming=True, format="alpaca")
    with pytest.raises(UserError, match="holds no records"):
        small_data(make_data(sources={"toy": source}), tmp_path, max_row_length=512)
