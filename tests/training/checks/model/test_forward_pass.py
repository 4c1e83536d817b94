from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sft_lightning.checks import Check, CheckError
from sft_lightning.training import forward
from sft_lightning.training.checks.model.forward_pass import Measured


def outcomes(make_run: Callable[..., Any], **changes: Any) -> dict[str, Check]:
    trainer, module, data = make_run(trainer_max_steps=1, **changes)
    trainer.fit(module, data)
    return {check.name: check for check in module.checks.checks}


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_the_losses_of_a_run_are_those_of_cross_entropy_on_the_models_logits(
    packing: str, make_run: Callable[..., Any]
) -> None:
    found = outcomes(make_run, packing=packing)
    assert found["loss"].passed
    assert found["isolation"].passed is (True if packing == "best_fit" else None)


@pytest.mark.parametrize("fault", ["shift", "scale"])
def test_a_wrong_loss_stops_the_run(fault: str, make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    find = forward.find_targets

    def wrong(batch: Any) -> Any:
        found = find(batch)
        return found._replace(ids=found.ids.roll(1)) if fault == "shift" else found._replace(weights=found.weights / 2)

    monkeypatch.setattr(forward, "find_targets", wrong)
    with pytest.raises(CheckError, match="check failed: loss"):
        outcomes(make_run, packing="none")


def test_documents_that_see_each_other_stop_the_run(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = forward.decoder_inputs

    def without_lengths(batch: Any) -> dict[str, Any]:
        whole = torch.tensor([[batch["input_ids"].shape[1]]] * len(batch["input_ids"]))
        return {**make(batch), "document_lengths": whole.tolist()}

    monkeypatch.setattr("sft_lightning.training.startup.check_attention", lambda *_, **__: None)
    monkeypatch.setattr(forward, "decoder_inputs", without_lengths)
    with pytest.raises(CheckError, match="check failed: isolation"):
        outcomes(make_run, packing="best_fit")


@pytest.mark.parametrize(
    ("loss", "expected", "passed"),
    [
        (10.0, 10.0, True),
        (10.002, 10.0, True),
        (10.2, 10.0, False),
        (float("nan"), 10.0, False),
        (1.0, float("nan"), None),
    ],
)
def test_losses_may_differ_by_a_few_roundings(loss: float, expected: float, passed: bool | None) -> None:
    assert Measured(loss, expected, 20.0, 1e-7).check("loss", "a document").passed is passed
    assert Measured(10.2, 10.0, 20.0, 0.0078).check("loss", "a document").passed
