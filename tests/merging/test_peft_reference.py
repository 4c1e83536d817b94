from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft.tuners.lora import Linear

from sft_lightning.merging.layers import LayerMerger
from sft_lightning.merging.merge import MergeOptions, merge_adapters
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.base.weight_files import weight_files

Make = Callable[..., Any]
"""A helper of conftest.py."""


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (AdapterConfig(r=2, init="pissa"), "init_lora_weights 'pissa' changes the base"),
        (AdapterConfig(r=2, init="olora"), "init_lora_weights 'olora' changes the base"),
    ],
)
def test_an_adapter_that_changes_the_base_first_is_merged_into_the_whole_model_and_reported(
    config: AdapterConfig,
    why: str,
    model_dir: Path,
    tmp_path: Path,
    make_adapter: Make,
    assert_merged: Make,
) -> None:
    adapter = make_adapter(model_dir, tmp_path / "adapter", config)
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(max_shard_size="50KB"))
    assert report.whole_model_reason is not None
    assert why in report.whole_model_reason
    assert len(weight_files(tmp_path / "merged")) > 1
    assert_merged(model_dir, adapter, tmp_path / "merged")


def test_a_merged_model_that_answers_differently_is_an_error_and_leaves_no_folder(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LayerMerger, "merge", lambda self, name, weight: weight)
    with pytest.raises(RuntimeError, match="more than rounding"):
        merge_adapters([str(adapter)], str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / ".merged.new").exists()


def test_a_wrong_merge_by_peft_itself_is_an_error(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Linear, "merge", lambda self, **_: None)
    with pytest.raises(RuntimeError, match="merging changes the model's answers"):
        merge_adapters([str(adapter)], str(tmp_path / "merged"))
