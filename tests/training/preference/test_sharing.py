from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sft_lightning.training.preference.losses import PreferenceConfig
from sft_lightning.training.preference.sharing import SharingProbe, shared_fraction
from sft_lightning.types import num_tokens

Train = Callable[..., Any]


@pytest.mark.parametrize(
    ("kind", "packing"),
    [
        ("lora without dropout", "best_fit"),
        pytest.param("lora without dropout", "none", marks=pytest.mark.slow),
        pytest.param("full", "best_fit", marks=pytest.mark.slow),
        pytest.param("full", "none", marks=pytest.mark.slow),
    ],
)
def test_a_shared_prompt_gives_the_loss_and_the_gradient_of_two_conversations(
    kind: str, packing: str, train: Train
) -> None:
    shared, separate = (
        train(kind, preference=PreferenceConfig(share_prompts=share), data={"packing": packing})
        for share in (True, False)
    )
    tokens = [next(iter(run.data.train_dataloader()))["num_tokens"] for run in (shared, separate)]
    assert tokens[0] < 0.8 * tokens[1]
    assert shared.losses == pytest.approx(separate.losses, rel=1e-6)
    assert separate.gradient_difference(shared) <= 1e-6


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"preference": PreferenceConfig(share_prompts=False)}, "model.preference.share_prompts is false"),
        ({"attn_implementation": "sdpa"}, "the model's attention is sdpa"),
        ({"neftune_alpha": 5.0}, "model.neftune_alpha adds noise to each conversation"),
    ],
)
def test_prompts_are_not_shared_if_the_spec_forbids_it_and_the_log_says_why(
    model: dict[str, Any], reason: str, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        run = train(**model, data={"packing": "none"}, trainer={"max_steps": 1})
    assert not run.data.layout.share_prompts
    assert f"prompt sharing: off ({reason}" in caplog.text


def test_attention_that_lets_answers_see_each_other_switches_sharing_off(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The attention then reads a shared prompt and both answers as one document.
    monkeypatch.setattr(
        "sft_lightning.batch.split_shared_prompts",
        lambda lengths: ([num_tokens(each) for each in lengths],) * 2 + ([None] * len(lengths),),
    )
    with caplog.at_level("INFO"):
        run = train(trainer={"max_steps": 1})
    assert not run.data.layout.share_prompts
    assert "from those of separate conversations" in caplog.text


def test_the_log_says_how_many_tokens_sharing_saves(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run = train(trainer={"max_steps": 1})
    assert run.data.layout.share_prompts
    saved = shared_fraction(run.data)
    assert 0.2 < saved < 0.5  # less than half: an answer's own tokens are never shared
    assert f"prompt sharing: on, {saved:.0%} fewer tokens to compute" in caplog.text


@pytest.mark.parametrize(
    ("leak", "difference", "effect", "passed"),
    [
        (0.0, 1e-6, 10.0, True),
        (1e-3, 1e-6, 10.0, False),  # the other answer is seen
        (0.0, 1e-2, 10.0, False),  # more than rounding
        (0.0, 1e-4, 1e-4, False),  # a lost prompt would look the same
        (float("nan"), 1e-6, 10.0, False),
        (0.0, float("nan"), 10.0, False),
    ],
)
def test_a_probe_passes_only_if_nothing_but_rounding_differs(
    leak: float, difference: float, effect: float, passed: bool
) -> None:
    probe = SharingProbe(leak=leak, difference=difference, effect=effect, tolerance=1e-3)
    assert probe.passed is passed
