from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.selftest.checks import masks

LETTERS = "".join(map(chr, range(33, 127))) + "\n"
Make = Callable[..., SFTDataModule]


def test_exact_masks_and_prompts_pass_for_each_source(make_data: Make, alpaca_file: Path) -> None:
    data = make_data(val_sources={"held": SourceConfig(path=str(alpaca_file))})
    checks = list(masks.check_masks(data, num_records=5))
    assert [(check.name, check.passed) for check in checks] == [
        ("masks of toy", True), ("prompts of toy", True), ("masks of held", True), ("prompts of held", True),
    ]  # fmt: skip
    assert checks[0].figure.startswith("5 examples: ")


def test_masks_that_are_off_by_one_token_fail(make_data: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = masks.tokenize

    def shifted(*args: Any) -> Any:
        return [replace(example, loss_weights=np.roll(example.loss_weights, 1)) for example in exact(*args)]

    monkeypatch.setattr(masks, "tokenize", shifted)
    supervised, prompts = masks.check_masks(make_data(), num_records=3)
    assert supervised.passed is False
    assert "3 examples differ" in supervised.figure
    assert prompts.passed


def sentencepiece(folder: Path) -> Path:
    """A tokenizer that writes a space after special tokens when it decodes, as Llama 2's does."""
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), *((letter, -3.0) for letter in sorted({*LETTERS, "▁"}))], 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return folder


def test_a_space_that_the_decoder_adds_after_a_special_token_is_no_wrong_mask(make_data: Make, tmp_path: Path) -> None:
    data = make_data(
        template="llama2", loss_on="all", tokenizer_name_or_path=str(sentencepiece(tmp_path / "tokenizer"))
    )
    supervised, _ = masks.check_masks(data, num_records=3)
    assert supervised.passed, supervised.figure
