from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    FalconConfig,
    GPT2Config,
    MambaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from sft_lightning.merging.merge import MergeOptions, merge_adapters
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.quantization import load_quantized

Make = Callable[..., Any]
"""A helper of conftest.py."""

QUANTIZED_FAMILIES: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=64),
    "falcon": FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=1, state_size=8, time_step_rank=4),
}


@pytest.mark.parametrize("bits", [4, 8])
def test_both_bases_are_measured_and_the_one_closer_to_the_trained_model_is_written(
    bits: int,
    model_dir: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    make_quantized_run: Make,
) -> None:
    adapter = make_quantized_run(model_dir, tokenizer, tmp_path / "adapter", bits)
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"))
    assert report.divergences.keys() == {"original", "dequantized"}
    assert report.base == min(report.divergences, key=lambda base: report.divergences[base])
    if bits == 4:
        assert report.base == "dequantized"
        assert report.divergences["dequantized"] < report.divergences["original"] / 100
    assert not (tmp_path / "merged/original").exists()
    assert not (tmp_path / "merged/dequantized").exists()


@pytest.mark.parametrize("family", ["llama", *QUANTIZED_FAMILIES])
def test_the_dequantized_base_answers_like_the_trained_model(
    family: str,
    model_dir: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    make_base: Make,
    load_model: Make,
    logits: Make,
    make_quantized_run: Make,
) -> None:
    base = model_dir
    if family != "llama":
        shape = copy.deepcopy(QUANTIZED_FAMILIES[family])
        shape.vocab_size = len(tokenizer)
        base = make_base(tmp_path / "base", shape)
    adapter = make_quantized_run(base, tokenizer, tmp_path / "adapter", 4)
    quantized = load_quantized(str(base), QuantizationConfig(bits=4), dtype=torch.float32)
    trained = logits(PeftModel.from_pretrained(quantized, adapter).eval())
    merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(base="dequantized"))
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), trained, atol=1e-4, rtol=0)


def test_the_base_that_the_user_names_is_the_one_that_is_written(
    model_dir: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    assert_merged: Make,
    make_quantized_run: Make,
) -> None:
    adapter = make_quantized_run(model_dir, tokenizer, tmp_path / "adapter", 4)
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(base="original"))
    assert report.base == "original"
    assert_merged(model_dir, adapter, tmp_path / "merged")


def test_a_quantized_base_gets_the_longer_context_that_it_was_trained_with(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, make_quantized_run: Make
) -> None:
    adapter = make_quantized_run(model_dir, tokenizer, tmp_path / "adapter", 4)
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    manifest = json.loads((adapter / "run_manifest.json").read_text())
    (adapter / "run_manifest.json").write_text(json.dumps({**manifest, "rope_parameters": rope}))
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"))
    assert report.divergences["dequantized"] < 1e-9  # else both would be far from a model of other positions
