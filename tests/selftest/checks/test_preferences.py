from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from sft_lightning.selftest.checks.preferences import check_start, start_loss
from sft_lightning.training.preference.losses import PreferenceConfig


def run(loss: float, adapter: Any = None) -> Any:
    module = SimpleNamespace(spec=SimpleNamespace(adapter=adapter))
    trainer = SimpleNamespace(callback_metrics={"train/loss": loss})
    return SimpleNamespace(module=module, trainer=trainer, rounding=1e-7)


@pytest.mark.parametrize(
    ("config", "loss"),
    [
        (PreferenceConfig(loss="sigmoid"), math.log(2)),
        (PreferenceConfig(loss="ipo", beta=0.1), 25.0),
        (PreferenceConfig(loss="hinge"), 1.0),
    ],
)
def test_the_loss_of_equal_log_ratios_passes(config: PreferenceConfig, loss: float) -> None:
    assert start_loss(config) == pytest.approx(loss)
    assert check_start(run(loss), config).passed
    assert check_start(run(loss * 1.001), config).passed is False


def test_a_loss_without_a_reference_is_not_checked() -> None:
    assert check_start(run(1.0), PreferenceConfig(loss="orpo")).passed is None


def test_a_continued_adapter_whose_reference_is_the_base_is_not_checked() -> None:
    adapter = SimpleNamespace(path="runs/sft/adapter")
    check = check_start(run(1.0, adapter), PreferenceConfig(reference="adapter_off"))
    assert check.passed is None
