from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from sft_lightning.checks import Check, CheckError
from sft_lightning.training.preference import reference_log_probs
from sft_lightning.training.preference.forward import answer_log_probs
from sft_lightning.training.preference.losses import PreferenceConfig
from sft_lightning.training.preference.reference_checks import check_apart, check_constant, check_tables
from sft_lightning.training.preference.reference_log_probs import ReferenceLogProbs

LEARNS = 1e-2


def outcomes(run: Any) -> dict[str, Check]:
    return {check.name: check for check in run.module.checks.checks}


@pytest.mark.parametrize(
    ("kind", "where"), [("lora", "adapter_off"), ("qlora", "adapter_off"), ("full", "precomputed")]
)
def test_the_reference_is_computed_again_and_the_policy_moves_away(
    kind: str, where: str, train: Callable[..., Any]
) -> None:
    found = outcomes(train(kind, lr=LEARNS, trainer={"max_steps": 2}))
    assert found["reference model"].passed, found["reference model"].figure
    assert found["reference model"].figure.startswith(f"{where}: log-probabilities of a pair, computed again")
    assert found["reference at the end"].passed
    assert found["policy and reference"].passed
    assert found["policy and reference"].times == 2


def test_a_table_of_reference_log_probabilities_is_checked_with_an_adapter_too(train: Callable[..., Any]) -> None:
    preference = PreferenceConfig(reference="precomputed")
    run = train("modules_to_save", lr=LEARNS, trainer={"max_steps": 1}, preference=preference)
    assert outcomes(run)["reference model"].passed


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_reference_that_is_the_policy_stops_the_run(
    kind: str, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    @torch.no_grad()
    def by_the_policy(self: ReferenceLogProbs, module: Any, batch: Any, *rest: Any) -> torch.Tensor:
        with reference_log_probs.evaluating(module):
            return answer_log_probs(module, batch).log_probs

    monkeypatch.setattr(ReferenceLogProbs, "log_probs", by_the_policy)
    with pytest.raises(CheckError, match=r"policy and reference: log-probabilities of \d pairs differ by up to 0"):
        train(kind, lr=LEARNS, trainer={"max_steps": 1})


def test_an_adapter_that_stays_on_is_found_at_the_latest_at_the_end(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_log_probs, "adapter_off", lambda model: nullcontext())
    monkeypatch.setattr("sft_lightning.training.preference.reference_checks.check_apart", lambda *_, **__: passed())
    with pytest.raises(CheckError, match=r"reference at the end: \d pairs: log-probabilities differ from those at the"):
        train("lora", lr=LEARNS, trainer={"max_steps": 2})


def passed() -> Check:
    return Check("policy and reference", True, "as if it was not checked")


def test_a_wrong_table_stops_the_run_before_its_first_step(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = reference_log_probs.compute_table
    for name in ("load_table", "save_table"):  # the wrong one is kept from other tests
        monkeypatch.setattr(reference_log_probs, name, lambda *given: None)
    monkeypatch.setattr(reference_log_probs, "compute_table", lambda *given: compute(*given).roll(1, dims=1))
    with pytest.raises(CheckError, match=r"reference model: precomputed: .* by the model before training, differ by"):
        train("full", lr=LEARNS)


def test_updates_that_rounding_may_lose_are_not_judged() -> None:
    one = torch.tensor([[-3.0, -4.0]])
    assert check_apart(one, one, must_differ=False).passed is None
    assert check_apart(one, one, must_differ=True).passed is False
    assert check_apart(one[:0], one[:0], must_differ=True).passed is None
    assert check_constant(one[:0], one[:0], 1e-5).passed is None


def test_a_continued_run_has_the_tables_of_its_checkpoint() -> None:
    table = torch.tensor([[-3.0, -4.0]])
    assert check_tables({"a": table}, {"a": table.clone(), "b": table}).passed
    other = check_tables({"a": table}, {"a": table + 0.5})
    assert other.passed is False
    assert other.figure.endswith("differ from the checkpoint's by 5.0e-01")
    assert check_tables({"a": table}, {"b": table}).passed is None
