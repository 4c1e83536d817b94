"""Covers sft_lightning.data.datamodule with streamed sources: what it reads, refuses, reports and saves."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft_lightning.cli.commands.prepare import prepare
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.errors import UserError


@pytest.fixture
def module(model_dir: Path, alpaca_file: Path) -> Callable[..., SFTDataModule]:
    def make(max_steps: int | None = 3, accumulate: int = 1, limit: float = 1.0, **changes: Any) -> SFTDataModule:
        options: dict[str, Any] = {
            "sources": {"toy": SourceConfig(path=str(alpaca_file), streaming=True)},
            "template": "alpaca",
            "max_length": 256,
            "tokenizer_name_or_path": str(model_dir),
        }
        data = SFTDataModule(DataSpec(**{**options, **changes}))
        if max_steps is not None:
            data.trainer = SimpleNamespace(
                max_steps=max_steps, max_epochs=-1, accumulate_grad_batches=accumulate, world_size=1, global_rank=0,
                limit_train_batches=limit,
            )  # fmt: skip
        return data

    return make


Make = Callable[..., SFTDataModule]


def test_a_streamed_run_is_one_epoch_of_max_steps(module: Make) -> None:
    data = module(max_steps=5, accumulate=2)
    data.setup("fit")
    loader = data.train_dataloader()
    assert data.num_optimizer_steps == 5
    assert len(loader) == len(list(loader)) == 10
    report = data.report.as_dict()["sources"]["train/toy"]
    assert report["streaming"]
    assert report["format"] == "alpaca"
    assert report["records"] >= 24
    json.dumps(report)


def test_before_training_only_the_first_record_is_read(module: Make, tmp_path: Path) -> None:
    data = module(store_dir=str(tmp_path / "stores"))
    data.setup("fit")
    assert data.report.sources["train/toy"].format == "alpaca"
    assert data.report.sources["train/toy"].records == 0
    assert not (tmp_path / "stores").exists()


def test_a_stream_without_max_steps_is_refused(module: Make) -> None:
    with pytest.raises(UserError, match=r"^trainer.max_steps: not set, but data.sources are streamed"):
        module(max_steps=-1).setup("fit")


def test_limit_train_batches_is_refused(module: Make) -> None:
    data = module(max_steps=4, limit=0.5)
    data.setup("fit")
    with pytest.raises(UserError, match=r"trainer.limit_train_batches: not available with streamed sources .got 0.5"):
        data.train_dataloader()


def test_if_one_training_source_is_streamed_all_are(
    module: Make, alpaca_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(alpaca_file)
    data = module(sources={"a": SourceConfig(path=path, streaming=True), "b": SourceConfig(path=path)})
    with caplog.at_level(logging.INFO):
        data.setup("fit")
        data.setup("fit")
    assert caplog.text.count("this includes b: if one training source is streamed, all are") == 1
    assert "weights are shares of tokens" in caplog.text
    assert all(report.streaming for report in data.report.sources.values())


def test_validation_sources_beside_a_stream_have_stores(module: Make, alpaca_file: Path, tmp_path: Path) -> None:
    data = module(val_sources={"v": SourceConfig(path=str(alpaca_file))}, store_dir=str(tmp_path / "stores"))
    data.setup("fit")
    assert data.source_names("val") == ["v"]
    assert data.report.sources["val/v"].examples == 24


def test_prepare_says_that_no_store_is_written_for_a_stream(
    module: Make,
    tmp_path: Path,
    alpaca_file: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = module(
        max_steps=None, store_dir=str(tmp_path / "stores"), val_sources={"v": SourceConfig(path=str(alpaca_file))}
    )
    with caplog.at_level(logging.INFO):
        prepare(data)
    assert "toy are read and tokenized during training; no token store is written" in caplog.text
    out = capsys.readouterr().out
    assert "val/v: " in out
    assert "train/toy: " not in out


def test_a_checkpoint_of_stored_data_is_refused(module: Make, alpaca_file: Path, tmp_path: Path) -> None:
    stored = module(sources={"toy": SourceConfig(path=str(alpaca_file))}, store_dir=str(tmp_path / "stores"))
    stored.setup("fit")
    data = module()
    data.setup("fit")
    with pytest.raises(UserError, match="different data settings"):
        data.load_state_dict(stored.state_dict())
    data.load_state_dict(module().state_dict())
