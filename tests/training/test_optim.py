from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes import optim as bnb
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import Adafactor

from sft_lightning.errors import UserError
from sft_lightning.training.optim import (
    LRScheduleConfig,
    build_optimizer,
    check_float16,
    lr_factor,
    parameter_groups,
)


def factors(steps: int, **config: Any) -> list[float]:
    return [round(lr_factor(LRScheduleConfig(**config), step, steps), 4) for step in range(steps + 1)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"name": "constant"}, [1, 1, 1, 1, 1]),
        ({"name": "linear"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"name": "cosine"}, [1, 0.8536, 0.5, 0.1464, 0]),
        ({"name": "polynomial"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"name": "polynomial", "power": 2.0}, [1, 0.5625, 0.25, 0.0625, 0]),
        ({"name": "polynomial", "power": 2.0, "min_lr_ratio": 0.5}, [1, 0.7812, 0.625, 0.5312, 0.5]),
        ({"name": "cosine_with_restarts"}, [1, 0.8536, 0.5, 0.1464, 0]),
        ({"name": "cosine_with_restarts", "num_cycles": 2}, [1, 0.5, 1, 0.5, 0]),
        ({"name": "wsd", "decay_ratio": 0.5}, [1, 1, 1, 0.5, 0]),
        ({"name": "wsd", "decay_ratio": 0.5, "warmup_steps": 1, "min_lr_ratio": 0.2}, [0, 1, 1, 0.6, 0.2]),
        ({"name": "wsd", "decay_ratio": 0.0}, [1, 1, 1, 1, 0]),
        ({"name": "wsd", "decay_ratio": 1.0, "warmup_steps": 2}, [0, 0.5, 1, 0.5, 0]),
        ({"name": "linear", "warmup_steps": 2}, [0, 0.5, 1, 0.5, 0]),
        ({"name": "linear", "warmup_ratio": 0.5}, [0, 0.5, 1, 0.5, 0]),
        ({"name": "linear", "min_lr_ratio": 0.2}, [1, 0.8, 0.6, 0.4, 0.2]),
        ({"name": "constant", "warmup_steps": 4}, [0, 0.25, 0.5, 0.75, 1]),
    ],
)
def test_each_schedule_has_the_expected_rates_over_four_steps(config: dict[str, Any], expected: list[float]) -> None:
    assert factors(4, **config) == expected


def test_wsd_decays_over_the_last_tenth_by_default() -> None:
    values = factors(100, name="wsd", warmup_ratio=0.1)
    assert set(values[10:91]) == {1.0}
    assert values[95] == 0.5
    assert values[100] == 0.0


@pytest.mark.parametrize("name", ["linear", "wsd", "polynomial", "cosine", "cosine_with_restarts"])
def test_after_the_planned_end_the_rate_stays_at_its_last_value(name: Any) -> None:
    assert lr_factor(LRScheduleConfig(name=name, min_lr_ratio=0.1), 9, 4) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "config",
    [
        {"warmup_ratio": 0.1, "warmup_steps": 1},
        {"warmup_ratio": 1.1},
        {"warmup_steps": -1},
        {"min_lr_ratio": 2.0},
        {"name": "polynomial", "power": 0.0},
        {"name": "wsd", "decay_ratio": 1.5},
        {"name": "cosine_with_restarts", "num_cycles": 0},
        {"name": "cosine", "num_cycles": 2},
        {"name": "linear", "power": 2.0},
        {"name": "constant", "decay_ratio": 0.1},
    ],
)
def test_a_schedule_refuses_values_out_of_range_and_keys_of_another_schedule(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model\.lr_scheduler"):
        LRScheduleConfig(**config)


def test_vectors_have_no_weight_decay_and_no_group_is_empty() -> None:
    model = torch.nn.Linear(3, 2)
    matrices, vectors = parameter_groups(model.named_parameters())
    assert [p.shape for p in matrices["params"]] == [(2, 3)]
    assert vectors["weight_decay"] == 0.0
    model.bias.requires_grad = False
    assert len(parameter_groups(model.named_parameters())) == 1


def test_a_matrix_that_zero_3_has_flattened_gets_weight_decay() -> None:
    flat = torch.nn.Parameter(torch.zeros(0))
    flat.ds_shape = (3, 2)  # type: ignore[attr-defined]
    assert "weight_decay" not in parameter_groups([("weight", flat)])[0]


def test_a_model_without_trainable_parameters_is_an_error() -> None:
    with pytest.raises(UserError, match="no parameter trains"):
        parameter_groups([])


def named() -> list[tuple[str, torch.nn.Parameter]]:
    shapes = {
        "q.lora_A.default.weight": (2, 8), "q.lora_B.default.weight": (8, 2), "embed.weight": (9, 8),
        "norm.weight": (8,), "embed.lora_embedding_B.default": (8, 2),
    }  # fmt: skip
    return [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]


def test_the_schedule_scales_the_separate_rates_of_base_weights_and_of_lora_plus() -> None:
    parameters = named()
    groups = parameter_groups(
        parameters, base_names={"embed.weight", "norm.weight"}, base_lr=1e-5, lora_plus_ratio=16.0
    )
    optimizer = build_optimizer(lambda given: torch.optim.AdamW(given, lr=1e-3), groups)
    schedule = LambdaLR(optimizer, lambda step: lr_factor(LRScheduleConfig(name="linear"), step, 4))
    for _ in range(2):
        optimizer.step()
        schedule.step()
    lr = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: lr[id(parameter)] / 0.5 for name, parameter in parameters}
    assert found == pytest.approx(
        {
            "q.lora_A.default.weight": 1e-3,
            "q.lora_B.default.weight": 1.6e-2,
            "embed.lora_embedding_B.default": 1.6e-2,
            "embed.weight": 1e-5,
            "norm.weight": 1e-5,
        }
    )
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)  # the one that is logged
    assert all(group["params"] for group in optimizer.param_groups)


def test_lora_plus_without_lora_is_refused() -> None:
    with pytest.raises(UserError, match="no LoRA B matrices"):
        parameter_groups(torch.nn.Linear(2, 2).named_parameters(), lora_plus_ratio=4.0)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "torch Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
    "AdamW8bit": lambda groups: bnb.AdamW8bit(groups, lr=1e-2),
    "PagedAdamW8bit": lambda groups: bnb.PagedAdamW8bit(groups, lr=1e-2),
    "PagedAdamW32bit": lambda groups: bnb.PagedAdamW32bit(groups, lr=1e-2),
    "Lion": lambda groups: bnb.Lion(groups, lr=1e-2),
    "Lion8bit": lambda groups: bnb.Lion8bit(groups, lr=1e-2),
    "Adafactor": lambda groups: Adafactor(groups, lr=1e-2, relative_step=False, scale_parameter=False),
}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_with_the_rates_of_the_schedule(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(96, 64)  # large enough for 8-bit states
    optimizer = build_optimizer(OPTIMIZERS[name], parameter_groups(model.named_parameters()))
    schedule = LambdaLR(optimizer, lambda step: lr_factor(LRScheduleConfig(name="linear"), step, 2))
    moved = []
    for _ in range(3):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        model(torch.ones(4, 96)).pow(2).mean().backward()
        optimizer.step()
        schedule.step()
        moved.append(float((model.weight.detach() - before).abs().max()))
    assert moved[0] > 0
    assert moved[1] > 0
    assert moved[2] == 0  # past the end: a rate of zero
    assert math.isfinite(sum(moved))


def test_8_bit_optimizers_keep_their_state_in_8_bits() -> None:
    model = torch.nn.Linear(96, 64)
    optimizer = build_optimizer(OPTIMIZERS["AdamW8bit"], parameter_groups(model.named_parameters()))
    model(torch.ones(4, 96)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["state1"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda groups: Adafactor(groups), "relative_step: false"),
        (lambda groups: Adafactor(groups, lr=1e-3), "Cannot combine manual"),
        (lambda groups: torch.optim.AdamW(groups, lr=-1.0), "Invalid learning rate"),
    ],
)
def test_an_optimizer_that_no_schedule_can_scale_is_refused(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_optimizer(make, parameter_groups(torch.nn.Linear(2, 2).named_parameters()))


def test_loss_scaling_refuses_float16_weights_and_takes_a_fused_optimizer() -> None:
    with pytest.raises(UserError, match=r"model\.dtype.*cannot unscale"):
        check_float16(torch.optim.AdamW(torch.nn.Linear(2, 2).half().parameters()), scales_loss=True)
    for fused in (False, True):
        check_float16(torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), fused=fused), scales_loss=True)


def test_float16_weights_do_not_train_without_a_scaled_loss_because_they_become_nan() -> None:
    model = torch.nn.Linear(2, 2).half()
    optimizer = torch.optim.AdamW(model.parameters())
    (model.weight * 1e-8).sum().backward()
    optimizer.step()
    assert model.weight.isnan().any()
    with pytest.raises(UserError, match=r"trainer\.precision: float16 weights train.*bf16-mixed"):
        check_float16(optimizer, scales_loss=False)
