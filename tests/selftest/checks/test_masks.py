from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.selftest.checks import masks
from sft_lightning.types import Segment

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


def test_consecutive_supervised_segments_are_one_text() -> None:
    segments = [Segment("a", False), Segment("b", True), Segment("c", True), Segment("d", False), Segment("", True)]
    assert masks.supervised_texts(segments) == ["bc"]


def test_the_first_difference_between_texts_and_tokens_is_described() -> None:
    assert masks.first_difference(["bc"], ["bc"]) is None
    assert "supervised text 1 is 'bc', but its tokens decode to 'c'" in str(masks.first_difference(["bc"], ["c"]))
    assert "1 supervised texts, but 2 runs" in str(masks.first_difference(["bc"], ["bc", "d"]))
