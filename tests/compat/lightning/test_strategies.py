"""Single calls; what two processes do with these strategies is tested in tests/strategies."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import ModelParallelStrategy

from sft_lightning.compat.lightning.strategies import HookedDeepSpeedStrategy, MeshStrategy

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed extra")


def test_the_mesh_has_one_axis_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(ModelParallelStrategy, "_setup_distributed", lambda self: None)
    monkeypatch.setattr(ModelParallelStrategy, "root_device", torch.device("cpu"))
    monkeypatch.setattr(
        "lightning.pytorch.strategies.model_parallel._setup_device_mesh", lambda *sizes: seen.extend(sizes)
    )
    strategy = MeshStrategy()
    strategy.parallel_devices = 4 * [torch.device("cpu")]
    strategy.accelerator = CPUAccelerator()
    strategy._lightning_module = LightningModule()
    strategy.use_one_mesh_axis(4)
    strategy.setup_environment()
    assert seen[:2] == [4, 1]


def test_a_backend_that_is_chosen_late_is_the_one_that_starts() -> None:
    strategy = MeshStrategy()
    strategy.use_backend("cpu:gloo,cuda:nccl")
    assert strategy.process_group_backend == "cpu:gloo,cuda:nccl"


class Noting(HookedDeepSpeedStrategy):
    """Notes which hooks are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def fill_config(self) -> None:
        self.calls.append("config")
        self.config = {"zero_optimization": {"stage": 2}}

    def make_optimizer(self) -> tuple[Any, Any]:
        self.calls.append("optimizer")
        raise KeyboardInterrupt  # DeepSpeed's engine comes next


@needs_deepspeed
def test_the_configuration_is_filled_once_and_the_optimizer_is_made_by_the_hook() -> None:
    strategy = Noting()
    strategy.prepare_config()
    strategy.prepare_config()
    with pytest.raises(KeyboardInterrupt):
        strategy._initialize_deepspeed_train(torch.nn.Linear(1, 1))
    assert strategy.calls == ["config", "optimizer"]


@needs_deepspeed
def test_on_a_cpu_the_root_device_has_an_index_and_gloo_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = Noting()
    strategy.parallel_devices = [torch.device("cpu")]
    started: list[str | None] = []
    monkeypatch.setattr(Noting, "_init_deepspeed_distributed", lambda self: started.append(self.process_group_backend))
    monkeypatch.setattr(Noting, "set_world_ranks", lambda self: None)
    monkeypatch.setattr(Noting, "local_rank", 0)
    strategy.setup_distributed()
    assert strategy.root_device == torch.device("cpu", 0)
    assert started == ["gloo"]
