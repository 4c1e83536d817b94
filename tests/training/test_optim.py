from __future__ import annotations

from typing import Any

import pytest
import torch

from sft_lightning.errors import UserError
from sft_lightning.training.optim import LRScheduleConfig, lr_factor, parameter_groups


def factors(steps: int, **config: Any) -> list[float]:
    return [round(lr_factor(LRScheduleConfig(**config), step, steps), 4) for step in range(steps + 1)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"name": "constant"}, [1, 1, 1, 1, 1]),
        ({"name": "linear"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"name": "cosine"}, [1, 0.8536, 0.5, 0.1464, 0]),
        ({"name": "linear", "warmup_steps": 2}, [0, 0.5, 1, 0.5, 0]),
        ({"name": "linear", "warmup_ratio": 0.5}, [0, 0.5, 1, 0.5, 0]),
        ({"name": "linear", "min_lr_ratio": 0.2}, [1, 0.8, 0.6, 0.4, 0.2]),
        ({"name": "constant", "warmup_steps": 4}, [0, 0.25, 0.5, 0.75, 1]),
    ],
)
def test_the_schedule_over_four_steps(config: dict[str, Any], expected: list[float]) -> None:
    assert factors(4, **config) == expected


def test_past_the_planned_end_the_rate_stays_at_its_last() -> None:
    assert lr_factor(LRScheduleConfig(name="linear", min_lr_ratio=0.1), 9, 4) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "config",
    [{"warmup_ratio": 0.1, "warmup_steps": 1}, {"warmup_ratio": 1.1}, {"warmup_steps": -1}, {"min_lr_ratio": 2.0}],
)
def test_a_schedule_checks_its_numbers(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model\.lr_scheduler"):
        LRScheduleConfig(**config)


def test_vectors_have_no_weight_decay_and_no_group_is_empty() -> None:
    model = torch.nn.Linear(3, 2)
    matrices, vectors = parameter_groups(model.named_parameters())
    assert [p.shape for p in matrices["params"]] == [(2, 3)]
    assert vectors["weight_decay"] == 0.0
    model.bias.requires_grad = False
    assert len(parameter_groups(model.named_parameters())) == 1


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing trains"):
        parameter_groups([])
