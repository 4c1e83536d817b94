from __future__ import annotations

import math

import pytest
import torch

from sft_lightning.errors import UserError
from sft_lightning.training.preference.losses import PreferenceConfig, score_pairs

POLICY = torch.tensor([[-10.0, -12.0], [-8.0, -3.0]])
REFERENCE = torch.tensor([[-11.0, -11.0], [-8.0, -4.0]])
LENGTHS = torch.tensor([[5, 4], [2, 3]])
DIFFERENCES = (2.0, -1.0)
"""(chosen - its reference) - (rejected - its reference)."""


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize(
    ("config", "loss"),
    [
        (PreferenceConfig(beta=0.5), lambda h: -log_sigmoid(0.5 * h)),
        (
            PreferenceConfig(beta=0.5, label_smoothing=0.2),
            lambda h: -0.8 * log_sigmoid(0.5 * h) - 0.2 * log_sigmoid(-0.5 * h),
        ),
        (PreferenceConfig(loss="ipo", beta=0.5), lambda h: (h - 1) ** 2),
        (PreferenceConfig(loss="hinge", beta=0.5), lambda h: max(0.0, 1 - 0.5 * h)),
    ],
    ids=["sigmoid", "conservative", "ipo", "hinge"],
)  # fmt: skip
def test_losses_with_a_reference_are_those_of_the_papers(config: PreferenceConfig, loss: object) -> None:
    scores = score_pairs(config, POLICY, REFERENCE, LENGTHS)
    assert scores.losses.tolist() == pytest.approx([loss(h) for h in DIFFERENCES], rel=1e-6)  # type: ignore[operator]
    assert scores.chosen_rewards.tolist() == pytest.approx([0.5 * 1.0, 0.0])
    assert scores.rejected_rewards.tolist() == pytest.approx([-0.5, 0.5])


def test_simpo_compares_means_per_token_with_a_margin() -> None:
    scores = score_pairs(PreferenceConfig(loss="simpo", beta=2.0, gamma=0.3), POLICY, None, LENGTHS)
    margins = [2 * (-10 / 5 + 12 / 4), 2 * (-8 / 2 + 3 / 3)]
    assert scores.losses.tolist() == pytest.approx([-log_sigmoid(m - 0.3) for m in margins], rel=1e-6)


def test_orpo_adds_an_odds_ratio_to_the_loss_of_the_chosen_answer() -> None:
    scores = score_pairs(PreferenceConfig(loss="orpo", beta=0.1), POLICY, None, LENGTHS)

    def log_odds(mean: float) -> float:
        return mean - math.log1p(-math.exp(mean))

    expected = [
        2.0 - 0.1 * log_sigmoid(log_odds(-10 / 5) - log_odds(-12 / 4)),
        4.0 - 0.1 * log_sigmoid(log_odds(-8 / 2) - log_odds(-3 / 3)),
    ]
    assert scores.losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_orpo_is_finite_for_an_answer_with_probability_1() -> None:
    policy = torch.tensor([[0.0, -3.0]], requires_grad=True)
    scores = score_pairs(PreferenceConfig(loss="orpo"), policy, None, torch.tensor([[2, 2]]))
    scores.losses.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(scores.losses).all()
    assert torch.isfinite(policy.grad).all()  # type: ignore[arg-type]


def test_a_loss_with_a_reference_requires_its_log_probabilities() -> None:
    with pytest.raises(ValueError, match="reference"):
        score_pairs(PreferenceConfig(), POLICY, None, LENGTHS)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"beta": 0.0}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        ({"gamma": 1.0}, "gamma"),
        ({"loss": "simpo", "gamma": -1.0}, "gamma"),
        ({"loss": "orpo", "reference": "precomputed"}, "reference"),
    ],
)
def test_values_out_of_range_or_not_valid_with_the_loss_are_refused(values: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=f"model.preference.{key}"):
        PreferenceConfig(**values)  # type: ignore[arg-type]
