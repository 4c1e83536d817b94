"""What the module asks of its strategy."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from sft_lightning.strategies import FSDP2, DeepSpeedZeRO
from sft_lightning.strategies.services import services_of

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed extra")


def test_a_strategy_of_lightning_leaves_weights_optimizer_and_gradients_to_the_module() -> None:
    services = services_of(SingleDeviceStrategy(torch.device("cpu")))
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))])
    assert services.prepare_optimizer(optimizer) is optimizer
    assert not services.shards_weights
    assert not services.manages_gradients
    assert services.grad_norm is None
    with services.full_weights():
        pass


def test_fsdp2_shards_weights_and_leaves_gradients_to_the_module() -> None:
    strategy = FSDP2()
    assert services_of(strategy) is strategy
    assert strategy.shards_weights
    assert not strategy.manages_gradients
    assert strategy.grad_norm is None


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_manages_gradients_and_shards_weights_under_stage_3(stage: int) -> None:
    strategy = DeepSpeedZeRO(stage=stage)
    assert services_of(strategy) is strategy
    assert strategy.manages_gradients
    assert strategy.shards_weights is (stage == 3)
