from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, PreTrainedTokenizerFast

from sft_lightning.merging import stream
from sft_lightning.merging.checks.weights import lora_updates
from sft_lightning.merging.merge import MergeOptions, merge_adapters
from sft_lightning.merging.quantized import QuantizedBase
from sft_lightning.models.adapters.config import AdapterConfig

Make = Callable[..., Any]
"""A helper of conftest.py."""


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(r=2),
        AdapterConfig(r=4, use_rslora=True),
        AdapterConfig(r=4, alpha_pattern={"q_proj": 3.0}, rank_pattern={"down_proj": 2}),
    ],
)
def test_weights_are_computed_again_from_the_files(
    config: AdapterConfig, model_dir: Path, tmp_path: Path, make_adapter: Make
) -> None:
    adapter = make_adapter(model_dir, tmp_path / "adapter", config)
    assert merge_adapters([str(adapter)], str(tmp_path / "merged")).num_verified == 3


def test_the_updates_of_several_adapters_add_up(model_dir: Path, tmp_path: Path, make_adapter: Make) -> None:
    both = [make_adapter(model_dir, tmp_path / str(seed), AdapterConfig(r=2), seed=seed) for seed in (1, 2)]
    assert merge_adapters([str(each) for each in both], str(tmp_path / "merged")).num_verified == 3


def test_weights_that_are_stored_the_other_way_round_are_compared(
    tmp_path: Path, make_base: Make, make_adapter: Make
) -> None:
    base = make_base(tmp_path / "base", GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2, n_positions=64))
    adapter = make_adapter(base, tmp_path / "adapter", AdapterConfig(r=2, target_modules=["c_attn", "c_proj"]))
    assert merge_adapters([str(adapter)], str(tmp_path / "merged")).num_verified == 3


def test_other_methods_are_left_to_the_logits(model_dir: Path, tmp_path: Path, make_adapter: Make) -> None:
    adapter = make_adapter(model_dir, tmp_path / "adapter", AdapterConfig(r=2, use_dora=True))
    assert lora_updates(adapter) == {}
    assert merge_adapters([str(adapter)], str(tmp_path / "merged")).num_verified == 0


def test_a_merge_without_alpha_over_r_is_refused_without_comparing_logits(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = stream.LayerMerger.merge
    monkeypatch.setattr(
        stream.LayerMerger, "merge", lambda self, name, weight: weight + (merge(self, name, weight) - weight) / 2
    )
    with pytest.raises(RuntimeError, match=r"is not that of the original base plus alpha / r · B A: it differs by"):
        merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(verify=False))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("base", ["original", "dequantized"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_merge_into_the_other_base_is_refused(
    bits: int,
    base: Any,
    model_dir: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    make_quantized_run: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = make_quantized_run(model_dir, tokenizer, tmp_path / "adapter", bits)
    options = MergeOptions(base=base, verify=False)
    assert merge_adapters([str(adapter)], str(tmp_path / "merged"), options).num_verified == 3
    write = stream.merge_weights

    def swapped(plan: Any, folder: Path, quantized: QuantizedBase | None) -> Any:
        return write(plan, folder, QuantizedBase(plan) if quantized is None else None)

    monkeypatch.setattr("sft_lightning.merging.merge.merge_weights", swapped)
    with pytest.raises(RuntimeError, match=f"is not that of the {base} base plus"):
        merge_adapters([str(adapter)], str(tmp_path / "other"), options)


def test_two_divergences_of_one_model_are_refused(
    model_dir: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    make_quantized_run: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = make_quantized_run(model_dir, tokenizer, tmp_path / "adapter", 4)
    monkeypatch.setattr("sft_lightning.merging.merge.bit_sum", lambda tensor: torch.zeros(()))
    with pytest.raises(RuntimeError, match="gave the same merged weights, so their divergences compare nothing"):
        merge_adapters([str(adapter)], str(tmp_path / "merged"))
