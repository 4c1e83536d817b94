"""What sharded strategies share: full weights for exports, and loading one process after the other."""

from __future__ import annotations

import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from peft import LoraConfig, get_peft_model
from torch import nn

from sft_lightning.errors import UserError
from sft_lightning.strategies.sharded_strategy import ShardedStrategy, one_process_at_a_time
from sft_lightning.strategies.sharding import ShardingSpec, fsdp2_sharding, zero_sharding


class Sharded(ShardedStrategy, SingleDeviceStrategy):
    """Has one process, and so full weights; what stands in for them is still another parameter."""

    def __init__(self, sharding: ShardingSpec) -> None:
        super().__init__(torch.device("cpu"))
        self._sharding = sharding

    @property
    def sharding(self) -> ShardingSpec:
        return self._sharding


class Module(LightningModule):
    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model


def strategy_with(language_model: nn.Module, sharding: ShardingSpec) -> Sharded:
    strategy = Sharded(sharding)
    strategy._lightning_module = Module(language_model)
    return strategy


def test_full_weights_stand_in_for_shards_while_the_context_is_open() -> None:
    model = nn.Linear(2, 2, bias=False)
    shard = model.weight
    with strategy_with(model, fsdp2_sharding()).full_weights():
        assert model.weight is not shard
        assert torch.equal(model.weight, shard)
    assert model.weight is shard


def test_shards_are_back_after_a_failed_export() -> None:
    model = nn.Linear(2, 2, bias=False)
    shard = model.weight
    with pytest.raises(OSError, match="disk full"), strategy_with(model, fsdp2_sharding()).full_weights():
        raise OSError("disk full")
    assert model.weight is shard


def test_of_an_adapted_model_only_the_adapter_is_gathered() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"], r=1))  # type: ignore[arg-type]
    layer: Any = model.base_model.model[0]  # type: ignore[index]
    base, adapter = layer.base_layer.weight, layer.lora_A["default"].weight
    with strategy_with(model, fsdp2_sharding()).full_weights():
        assert layer.base_layer.weight is base
        assert layer.lora_A["default"].weight is not adapter
    assert layer.lora_A["default"].weight is adapter


def test_weights_that_are_not_sharded_stay_in_place() -> None:
    model = nn.Linear(2, 2, bias=False)
    weight = model.weight
    with strategy_with(model, zero_sharding(2)).full_weights():
        assert model.weight is weight


def test_an_optimizer_that_cannot_step_on_shards_is_refused() -> None:
    strategy = strategy_with(nn.Linear(2, 2), zero_sharding(2, offload_optimizer=True))
    adam = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    assert strategy.prepare_optimizer(adam) is adam
    with pytest.raises(UserError, match=r"model\.optimizer: SGD cannot be offloaded to the CPU"):
        strategy.prepare_optimizer(torch.optim.SGD([nn.Parameter(torch.ones(2))]))


def load_in_turn(spans: Any) -> None:
    """Pretend to load; put when it began and ended, in seconds."""
    with one_process_at_a_time(wanted=True):
        begin = time.monotonic()
        time.sleep(0.1)
        spans.put((begin, time.monotonic()))


def test_processes_of_one_run_load_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    context = get_context("fork")
    spans = context.SimpleQueue()
    processes = [context.Process(target=load_in_turn, args=(spans,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    first, second = sorted(spans.get() for _ in processes)
    assert first[1] <= second[0]
