from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    PreTrainedTokenizerFast,
)

from sft_lightning.errors import UserError
from sft_lightning.merging.merge import MergeOptions, merge_adapters, parse_size
from sft_lightning.models.adapters.config import AdapterConfig

Make = Callable[..., Any]
"""A helper of conftest.py."""


@pytest.mark.slow
def test_several_adapters_are_merged_in_order(
    model_dir: Path,
    tmp_path: Path,
    make_adapter: Make,
    load_model: Make,
    logits: Make,
    assert_merged: Make,
) -> None:
    both = [
        make_adapter(model_dir, tmp_path / "one", AdapterConfig(r=2)),
        make_adapter(model_dir, tmp_path / "two", AdapterConfig(r=2, use_dora=True), seed=1),
    ]
    merge_adapters([str(both[0])], str(tmp_path / "first"))
    merge_adapters([str(adapter) for adapter in both], str(tmp_path / "both"))
    assert_merged(tmp_path / "first", both[1], tmp_path / "both")
    merge_adapters([str(adapter) for adapter in reversed(both)], str(tmp_path / "reversed"))
    assert (logits(load_model(tmp_path / "reversed")) - logits(load_model(tmp_path / "both"))).abs().max() > 1e-3


def test_dequantized_requires_a_base_that_was_quantized(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not say how it was quantized"):
        merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(base="dequantized"))


def test_without_measuring_the_user_must_choose_the_base(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, make_quantized_run: Make
) -> None:
    adapter = make_quantized_run(model_dir, tokenizer, tmp_path / "adapter", 4)
    with pytest.raises(UserError, match="cannot compare the bases, because --verify is false; set original"):
        merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(verify=False))
    with pytest.raises(UserError, match="no single trained model has all adapters"):
        merge_adapters([str(adapter)] * 2, str(tmp_path / "merged"))


def test_nothing_is_pushed_anywhere(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError

    for name in ("upload_file", "upload_folder", "create_repo", "create_commit"):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{name}", refuse)
    assert merge_adapters([str(adapter)], str(tmp_path / "merged")).output_dir.is_dir()


@pytest.mark.parametrize(
    ("size", "num_bytes"), [("5GB", 5 * 10**9), ("500mb", 500 * 10**6), ("1.5 GiB", 3 * 2**29), ("12", 12)]
)
def test_sizes_are_read_with_units_of_bytes(size: str, num_bytes: int) -> None:
    assert parse_size(size) == num_bytes


@pytest.mark.parametrize("size", ["", "5 apples", "GB", "-1GB", "0GB", "0", "infGB"])
def test_a_size_that_cannot_be_read_is_refused_before_anything_is_loaded(size: str) -> None:
    with pytest.raises(UserError, match=r"merge --max_shard_size: must be a size such as 5GB or 500MB \(got "):
        MergeOptions(max_shard_size=size)
