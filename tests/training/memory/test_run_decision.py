from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sft_lightning.training.memory import run_decision


def test_a_model_that_cannot_be_simulated_trains_with_all_layers_recomputed(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> Any:
        torch.rand(5)
        raise KeyError("no such layer\nat all")

    numbers = []
    monkeypatch.setattr(run_decision, "build_skeleton", fail)
    for free in (0.0, 1e15):
        monkeypatch.setattr(run_decision, "free_memory_bytes", lambda device, free=free: free)
        trainer, module, data = make_run(trainer_max_steps=1)
        with caplog.at_level(logging.INFO):
            trainer.fit(module, data)
        numbers.append(torch.rand(2).tolist())
    assert "gradient checkpointing: every decoder layer (auto: not simulated, KeyError: " in caplog.text
    assert trainer.global_step == 1
    assert numbers[0] == numbers[1]
