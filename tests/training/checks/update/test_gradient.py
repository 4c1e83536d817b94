from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from sft_lightning.checks import Check, CheckError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.training import forward, objective
from sft_lightning.training.checks import run_checks
from sft_lightning.training.checks.update.gradient import FirstGradient, compare_gradients
from sft_lightning.training.losses import LossSums
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.step import StepShare

MakeRun = Callable[..., Any]
"""A fixture of tests/training/conftest.py."""

LORA = {"adapter": AdapterConfig(r=2, dropout=0.3)}


def train(make_run: MakeRun, **changes: Any) -> dict[str, Check]:
    """Train one optimizer step, and return the outcomes of its checks by name."""
    options = {"trainer_max_steps": 1, "trainer_accumulate_grad_batches": 3, "packing": "none", **changes}
    trainer, module, data = make_run(**options)
    trainer.fit(module, datamodule=data)
    return {check.name: check for check in module.checks.checks}


@pytest.mark.parametrize(
    ("changes", "num_compared"),
    [
        ({}, 3),
        ({"packing": "best_fit", "trainer_accumulate_grad_batches": 1}, 1),
        (LORA, 3),
        ({**LORA, "quantization": QuantizationConfig(bits=4), "neftune_alpha": 5.0}, 3),
        ({"adapter": AdapterConfig(r=2, modules_to_save=["lm_head"]), "gradient_checkpointing": True}, 3),
        ({"trainer_precision": "bf16-mixed"}, 3),
    ],
)
def test_the_first_gradient_is_that_of_the_definition(
    changes: dict[str, Any], num_compared: int, make_run: MakeRun
) -> None:
    check = train(make_run, **changes)["first gradient"]
    assert check.passed, check.figure
    assert f"{num_compared} micro-batches" in check.figure


def test_the_check_leaves_random_states_and_weights_as_they_are(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for reason in (None, "as if it did not apply"):
        where = "sft_lightning.training.checks.update.gradient.reason_not_to"
        monkeypatch.setattr(where, lambda module, reason=reason: reason)
        trainer, module, data = make_run(trainer_max_steps=2, trainer_accumulate_grad_batches=2, **LORA)
        trainer.fit(module, datamodule=data)
        ends.append([*(p.detach().clone() for p in module.parameters() if p.requires_grad), torch.get_rng_state()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_training_goes_on_if_the_check_takes_too_much_memory(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("sft_lightning.training.checks.update.gradient.direct_gradient", too_large)
    found = train(make_run)
    assert found["first gradient"].passed is None
    assert "too much memory" in found["first gradient"].figure
    assert found["first update"].passed


class TwoProcesses:
    """A strategy whose other process cannot compute its gradient."""

    def reduce(self, value: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert value.dim() == 0, "no gradient is waited for"
        return value + 1


def test_a_process_that_cannot_compare_keeps_no_other_waiting() -> None:
    check = FirstGradient()
    check._expected = check._found = torch.ones(3)
    trainer = SimpleNamespace(strategy=TwoProcesses(), world_size=2)
    outcome = check._compare(cast("Any", SimpleNamespace(trainer=trainer, device="cpu")), averaged=True)
    assert outcome.passed is None
    assert outcome.figure == "a process has no gradient of the first step"


def mean_of_micro_batch(self: object, module: CausalLMModule, batch: Any) -> StepShare:
    sums = module(batch)
    return StepShare(sums.loss / sums.weight / module.trainer.accumulate_grad_batches)


def without_first(module: Any, head: Any, batch: Any) -> LossSums:
    """Leave out the loss of the first half of the supervised tokens, as if a chunk was dropped."""
    half = {**batch, "loss_weights": batch["loss_weights"].clone()}
    positions = batch["supervised"].flat
    half["loss_weights"].view(-1)[positions[: len(positions) // 2] + 1] = 0.0
    return token_loss_sums(module, head, half)


def shifted_twice(batch: Any) -> Any:
    targets = find_targets(batch)
    return targets._replace(ids=batch["input_ids"].flatten().roll(-1)[targets.positions + 1])


token_loss_sums, find_targets = forward.token_loss_sums, forward.find_targets


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ((objective.NextToken, "step_share"), mean_of_micro_batch),
        (("sft_lightning.training.module", "token_loss_sums"), without_first),
        (("sft_lightning.training.forward", "find_targets"), shifted_twice),
    ],
    ids=["the mean of means", "a dropped chunk", "labels that are shifted twice"],
)
def test_a_fault_in_the_loss_stops_the_run(
    where: tuple[Any, str], fault: Any, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = where
    monkeypatch.setattr(run_checks, "CHECKS", (FirstGradient,))
    monkeypatch.setattr(f"{owner}.{name}", fault) if isinstance(owner, str) else monkeypatch.setattr(owner, name, fault)
    with pytest.raises(CheckError, match="first gradient"):
        train(make_run, **LORA)


def test_clipping_each_micro_batch_stops_the_run(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def clip(self: CausalLMModule) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1e-3)

    monkeypatch.setattr(CausalLMModule, "on_after_backward", clip)
    with pytest.raises(CheckError, match="times as large as by the definition of the loss"):
        train(make_run)


def test_gradients_that_cannot_be_compared_say_why() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    assert compare_gradients(zero, one, "w", 1, 1e-3).passed is None
    assert compare_gradients(one, one * torch.nan, "w", 1, 1e-3).passed is None
    assert compare_gradients(one, one, "w", 1, 1e-3).passed
    assert compare_gradients(one, 2 * one, "w", 1, 1e-3).figure.endswith(
        "2 times as large as by the definition of the loss"
    )
