from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from sft_lightning.checks import CheckError, CheckLog
from sft_lightning.training import optim
from sft_lightning.training.checks.update.optimizer import LearningRate, check_groups, check_rates, expected_factor
from sft_lightning.training.optim import LRScheduleConfig, lr_factor

MakeRun = Callable[..., Any]
"""A fixture of tests/training/conftest.py."""

SCHEDULES = [
    LRScheduleConfig(),
    LRScheduleConfig(warmup_ratio=0.13),
    LRScheduleConfig(name="linear", warmup_steps=3, min_lr_ratio=0.1),
    LRScheduleConfig(name="constant", warmup_steps=5),
    LRScheduleConfig(name="polynomial", power=2.0),
    LRScheduleConfig(name="wsd", warmup_steps=2, decay_ratio=0.4),
    LRScheduleConfig(name="wsd", warmup_ratio=0.9, decay_ratio=0.4),
    LRScheduleConfig(name="cosine_with_restarts", num_cycles=3, warmup_steps=1),
    LRScheduleConfig(warmup_steps=50),
]


@pytest.mark.parametrize("config", SCHEDULES, ids=str)
def test_the_schedule_is_recomputed_at_every_step(config: LRScheduleConfig) -> None:
    for num_steps in (1, 7, 40):
        for step in range(num_steps + 3):
            assert expected_factor(config, step, num_steps) == pytest.approx(lr_factor(config, step, num_steps))


def test_a_rate_that_is_not_the_schedules_is_found_in_any_group() -> None:
    assert check_rates([1e-4, 2e-4], [2e-4, 4e-4], 0.5, 3).passed
    check = check_rates([1e-4, 3e-4], [2e-4, 4e-4], 0.5, 3)
    assert check.passed is False
    assert check.figure == "0.0003 at step 4, 0.0002 by model.lr_scheduler"


def named(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return list(model.named_parameters())


def test_groups_have_what_trains_and_no_vector_decays() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    groups = torch.optim.AdamW(optim.parameter_groups(named(model))).param_groups
    assert check_groups(named(model), groups).passed
    decayed = check_groups(named(model), torch.optim.AdamW(model.parameters()).param_groups)
    assert decayed.passed is False
    assert decayed.figure == "3 norms or biases have a weight decay: 0.bias …"


def test_a_tensor_that_trains_and_is_not_updated_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].bias.requires_grad = False
    groups = [{"params": [model[0].weight, model[0].bias, model[1].bias]}]
    check = check_groups(named(model), groups)
    assert check.passed is False
    assert check.figure.startswith("2 tensors that train, or that are updated, are not both: 0.bias, 1.weight")
    twice = [{"params": [p for _, p in named(model) if p.requires_grad] * 2}]
    assert check_groups(named(model), twice).figure == "3 tensors are updated twice"


def test_a_schedule_that_is_stepped_twice_stops_the_run(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    step = LambdaLR.step

    def twice(self: LambdaLR, *args: Any) -> None:
        step(self, *args)
        if self.last_epoch > 0:
            step(self, *args)

    monkeypatch.setattr(LambdaLR, "step", twice)
    trainer, module, data = make_run(trainer_max_steps=4, trainer_log_every_n_steps=1)
    with pytest.raises(CheckError, match=r"check failed: learning rate: .* at step 2, .* by model\.lr_scheduler"):
        trainer.fit(module, datamodule=data)


def test_rates_are_noted_when_a_step_is_logged_and_at_the_end() -> None:
    group = {"lr": 1.0, "initial_lr": 1.0}
    trainer = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[group])], global_step=0, log_every_n_steps=3)
    schedule = SimpleNamespace(lr_scheduler=LRScheduleConfig(name="constant"))
    data = SimpleNamespace(num_optimizer_steps=5)
    module: Any = SimpleNamespace(trainer=trainer, checks=CheckLog(), spec=schedule, data=data)
    check, times = LearningRate(), []
    check.on_train_start(module)
    for step in range(5):
        trainer.global_step = step
        check.on_before_optimizer_step(module, trainer.optimizers[0])
        trainer.global_step = step + 1
        check.on_train_batch_end(module, None, step)
        times.append(sum(each.times for each in module.checks.checks))
    check.on_train_end(module)
    assert times == [1, 1, 2, 2, 2]
    assert module.checks.checks[0].times == 3
