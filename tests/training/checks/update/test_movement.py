from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sft_lightning.checks import Check, CheckError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.training.checks.update.movement import Entries, check_update, layers_without_gradient
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.optim import LRScheduleConfig

MakeRun = Callable[..., Any]
"""A fixture of tests/training/conftest.py."""

FLOAT32 = {"a": torch.float32, "b": torch.float32}


def check(gradients: list[float], before: list[float], after: list[float], types: Any = None) -> Check:
    zeros = [torch.zeros((), dtype=torch.int64)] * 2
    entries = Entries(["a", "b"], zeros, torch.tensor(gradients), torch.tensor(before))
    return check_update(entries, torch.tensor(after), 1e-2, types or FLOAT32)


def test_tensors_with_a_gradient_must_move() -> None:
    assert check([1.0, 1.0], [0.0, 0.5], [0.1, 0.6]).passed
    unmoved = check([1.0, 1.0], [0.0, 0.5], [0.0, 0.6])
    assert unmoved.passed is False
    assert unmoved.figure == "1 tensors have a gradient and were not updated: a …"


def test_a_tensor_without_gradient_and_one_whose_update_is_rounded_away_may_stay() -> None:
    assert check([0.0, 1.0], [0.3, 0.5], [0.3, 0.6]).passed
    assert check([1.0, 1.0], [100.0, 0.5], [100.0, 0.6], {**FLOAT32, "a": torch.bfloat16}).passed


def test_a_step_without_gradients_is_not_judged() -> None:
    assert check([0.0, 0.0], [0.0, 0.5], [0.0, 0.5]).passed is None
    assert check([float("nan"), 1.0], [0.0, 0.5], [0.0, 0.6]).passed is None


def test_a_frozen_layer_is_found_beside_others_of_its_kind() -> None:
    gradients = {f"layers.{n}.q_proj.lora_{m}.default.weight": float(m == "B") for n in range(3) for m in "AB"}
    assert layers_without_gradient(gradients) == []
    gradients["layers.1.q_proj.lora_B.default.weight"] = 0.0
    assert layers_without_gradient(gradients) == ["layers.1.q_proj"] or layers_without_gradient(gradients)
    of_experts = {f"layers.0.experts.{n}.up_proj.weight": float(n) for n in range(2)}
    assert layers_without_gradient({**of_experts, "vision.0.weight": 0.0, "vision.1.weight": 0.0}) == []


def test_a_layer_whose_gradient_is_lost_stops_the_run(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(self: CausalLMModule) -> None:
        for name, parameter in self.named_parameters():
            if "layers.0.self_attn.q_proj.lora" in name:
                parameter.grad = None

    monkeypatch.setattr(CausalLMModule, "on_after_backward", lose)
    trainer, module, data = make_run(trainer_max_steps=1, adapter=AdapterConfig(r=2))
    with pytest.raises(CheckError, match=r"first update: 1 layers have no gradient.*layers\.0\.self_attn\.q_proj"):
        trainer.fit(module, datamodule=data)


@pytest.mark.parametrize("adapter", [None, AdapterConfig(r=2)])
def test_the_first_update_with_a_rate_above_zero_is_checked(adapter: AdapterConfig | None, make_run: MakeRun) -> None:
    trainer, module, data = make_run(
        trainer_max_steps=3, adapter=adapter, lr_scheduler=LRScheduleConfig(warmup_steps=1)
    )
    trainer.fit(module, datamodule=data)
    outcome = next(each for each in module.checks.checks if each.name == "first update")
    assert outcome.passed, outcome.figure
    assert outcome.times == 1
