"""The precision plugin and the CPU optimizer that DeepSpeed's engine gets."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sft_lightning.strategies.zero.engine import ZeroPrecision, cpu_adam

pytest.importorskip("deepspeed", reason="needs the deepspeed extra")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.bfloat16), ("bf16-mixed", torch.bfloat16), ("16-true", torch.float16)]
)
def test_a_bfloat16_base_is_converted_only_to_16_bits(precision: Any, dtype: torch.dtype) -> None:
    module = nn.Linear(2, 2, dtype=torch.bfloat16)
    assert ZeroPrecision(precision).convert_module(module).weight.dtype == dtype


def test_loss_weights_in_a_batch_are_not_rounded() -> None:
    batch = {"weights": torch.tensor([0.1])}
    assert ZeroPrecision("bf16-mixed").convert_input(batch) is batch


class Adam:
    """Stands in for DeepSpeed's CPU Adam, which is compiled at first use."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        self.groups, self.options = groups, options


@pytest.mark.parametrize(("make", "adamw_mode"), [(torch.optim.AdamW, True), (torch.optim.Adam, False)])
def test_the_cpu_adam_has_the_groups_and_hyper_parameters_of_the_torch_adam(
    monkeypatch: pytest.MonkeyPatch, make: Any, adamw_mode: bool
) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(DeepSpeedCPUAdam=Adam))
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "lr": 0.5}]
    replacement: Any = cpu_adam(make(groups, lr=0.25, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.125))
    assert replacement.options == {
        "adamw_mode": adamw_mode, "lr": 0.25, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0.125
    }  # fmt: skip
    assert [group["lr"] for group in replacement.groups] == [0.25, 0.5]
    assert replacement.groups[1]["params"] == weights[1:]
