from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sft_lightning.checks import Check
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.training.checks.update import direct_gradient

MakeRun = Callable[..., Any]
"""A fixture of tests/training/conftest.py."""


def first_gradient(make_run: MakeRun) -> Check:
    """Train one optimizer step of LoRA, and return the outcome of the check of its gradient."""
    adapter = AdapterConfig(r=2, dropout=0.3)
    trainer, module, data = make_run(trainer_max_steps=1, trainer_accumulate_grad_batches=2, adapter=adapter)
    trainer.fit(module, datamodule=data)
    return next(check for check in module.checks.checks if check.name == "first gradient")


@pytest.mark.parametrize("way", ["_loss_in_parts", "_loss_at_once"])
def test_both_ways_to_the_logits_give_the_gradient(
    way: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"_loss_in_parts": "_loss_at_once", "_loss_at_once": "_loss_in_parts"}[way]
    monkeypatch.setattr(direct_gradient, other, lambda *args: None)
    monkeypatch.setattr(direct_gradient, "_PART_BYTES", 1 << 15)  # a few tokens each
    check = first_gradient(make_run)
    assert check.passed, check.figure


def test_logits_that_cannot_be_made_in_parts_and_are_too_large_are_not_made(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_gradient, "_loss_in_parts", lambda *args: None)
    monkeypatch.setattr(direct_gradient, "_LOGIT_BYTES", 1)
    check = first_gradient(make_run)
    assert check.passed is None
    assert "too much memory" in check.figure
