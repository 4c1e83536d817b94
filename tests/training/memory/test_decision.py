"""What `gradient_checkpointing: auto` recomputes, in `fit` and in `plan`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from sft_lightning.errors import UserError
from sft_lightning.models.checkpointing import Recomputation
from sft_lightning.strategies.sharding import REPLICATED, fsdp2_sharding, zero_sharding
from sft_lightning.training.memory import run_decision
from sft_lightning.training.memory.decision import (
    USABLE_SHARE,
    check_recomputation,
    choices,
    decide_recomputation,
    generous_bound,
    given_recomputation,
)
from sft_lightning.training.memory.estimate import Estimator
from sft_lightning.training.memory.parts import GIB, Memory, Setup
from sft_lightning.training.memory.skeleton import build_skeleton
from sft_lightning.training.spec import TrainingSpec

SETUP = Setup(batch_size=1, max_length=64, recomputation=0, bits=None, sharding=REPLICATED)
NEEDED: dict[Recomputation, float] = {0: 90.0, "selective": 60.0, 2: 50.0, 1: 20.0}
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 300,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300}
MAMBA = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 300}


def needed(setup: Setup) -> Memory:
    activations = NEEDED[setup.recomputation] * GIB
    return Memory(weights=0, adapter=0, gradients=0, optimizer=0, activations=activations, temporary=0)


@pytest.mark.parametrize(("gib", "how"), [(100, 0), (80, "selective"), (60, 2), (30, 1), (1, 1)])
def test_the_fastest_way_that_fits_is_taken(gib: float, how: Recomputation) -> None:
    decision = decide_recomputation(needed, SETUP, list(NEEDED), gib * GIB)
    assert decision.how == how
    assert decision.reason.startswith("auto: off: 90.00 GiB")
    assert f"available: {USABLE_SHARE * gib:.2f} GiB" in decision.reason
    assert ("see the command plan" in decision.reason) is (gib == 1)


def test_layers_whose_weights_zero_3_gathers_are_not_recomputed_selectively() -> None:
    base = estimator_of(LLAMA).skeleton.base
    assert choices(base, zero_sharding(3)) == [0, 2, 1]
    assert choices(base, fsdp2_sharding()) == choices(base, zero_sharding(2)) == [0, "selective", 2, 1]
    check_recomputation("selective", fsdp2_sharding())
    check_recomputation(1, zero_sharding(3))
    with pytest.raises(UserError, match=r"selective is not available with trainer.strategy deepspeed_stage_3, .*true"):
        check_recomputation("selective", zero_sharding(3))


def test_a_way_that_cannot_be_simulated_is_passed_over_and_named() -> None:
    def partly(setup: Setup) -> Memory:
        if setup.recomputation == "selective":
            raise RuntimeError("changed in place\nhere")
        return needed(setup)

    decision = decide_recomputation(partly, SETUP, list(NEEDED), 80 * GIB)
    assert decision.how == 2
    assert "attention: not simulated, changed in place, every second" in decision.reason


@pytest.mark.parametrize(
    ("setting", "given"), [("auto", None), ("selective", "selective"), (True, 1), (False, 0), (3, 3)]
)
def test_a_setting_says_what_is_recomputed(setting: Any, given: Recomputation | None) -> None:
    assert given_recomputation(setting) == given


def estimator_of(shape: dict[str, Any], precision: str = "32-true") -> Estimator:
    spec = TrainingSpec(from_config=shape, tokenizer_name_or_path="none", dtype="float32", optimizer=torch.optim.AdamW)
    return Estimator(spec, build_skeleton(spec, 300, precision), precision=precision, max_length=64, accumulates=False)


def test_gradients_and_the_optimizers_state_count_before_they_exist() -> None:
    estimator = estimator_of(LLAMA)
    memory = estimator.memory(SETUP)
    beside_states = (memory.weights + memory.activations + memory.temporary) / USABLE_SHARE
    ways = choices(estimator.skeleton.base, REPLICATED)
    assert ways == [0, "selective", 2, 1]
    assert decide_recomputation(estimator.memory, SETUP, ways, memory.total / USABLE_SHARE).how == 0
    assert decide_recomputation(estimator.memory, SETUP, ways, beside_states).how != 0


@pytest.mark.parametrize(
    "shape", [LLAMA, GPT2, pytest.param(MAMBA, marks=pytest.mark.slow)], ids=["llama", "gpt2", "mamba"]
)
def test_the_generous_bound_is_above_the_simulated_memory(shape: dict[str, Any]) -> None:
    estimator = estimator_of(shape)
    memory = estimator.memory(SETUP)
    trained = sum(parameter.numel() for parameter in estimator.skeleton.trainable)
    bound = generous_bound(estimator.skeleton.base.config, tokens=64, width=64, num_trained=trained)
    assert memory.total - memory.weights < bound


@pytest.mark.parametrize("share", [pytest.param(1.05, marks=pytest.mark.slow), 0.5])
def test_fit_and_plan_decide_alike(
    share: float, make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, module, data = make_run(trainer_max_steps=1, dtype="float32")
    spec = module.spec
    planned = Estimator(
        spec, build_skeleton(spec, len(data.tokenizer)), precision="32-true", max_length=data.spec.max_length,
        accumulates=trainer.accumulate_grad_batches > 1,
    )  # fmt: skip
    setup = replace(SETUP, batch_size=data.spec.batch_size, max_length=data.spec.max_length)
    budget = share * planned.memory(setup).total / USABLE_SHARE
    expected = decide_recomputation(planned.memory, setup, choices(planned.skeleton.base, REPLICATED), budget)
    monkeypatch.setattr(run_decision, "budget_of", lambda model, device: budget)
    monkeypatch.setattr(run_decision, "free_memory_bytes", lambda device: 0.0)
    with caplog.at_level(logging.INFO):
        trainer.fit(module, data)
    assert f"gradient checkpointing: {expected}" in caplog.text
