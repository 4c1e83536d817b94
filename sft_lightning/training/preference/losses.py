"""Losses on pairs of answers, from their log-probabilities; everything is float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from sft_lightning.errors import UserError

PreferenceLoss = Literal["sigmoid", "ipo", "hinge", "orpo", "simpo"]

Reference = Literal["auto", "adapter_off", "precomputed"]

_WITHOUT_REFERENCE = ("orpo", "simpo")
_DEFAULT_GAMMA = 0.5


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """The loss on pairs of answers.

    Raises:
        UserError: If a value is out of range, or does not apply to the loss.
    """

    loss: PreferenceLoss = "sigmoid"
    """`sigmoid`: DPO (Rafailov et al., 2023, arXiv:2305.18290). `ipo` (Azar et al., 2023, arXiv:2310.12036). `hinge`:
    SLiC's loss on DPO's rewards (Zhao et al., 2023, arXiv:2305.10425; Liu et al., 2023, arXiv:2309.06657). Without a
    reference model: `orpo` (Hong et al., 2024, arXiv:2403.07691), `simpo` (Meng et al., 2024, arXiv:2405.14734)."""

    beta: float = 0.1
    """Strength of the pull towards the reference: a reward is beta times a log-ratio. With `orpo`, the weight of the
    odds-ratio term (lambda in the paper); with `simpo`, the scale of the reward (2 to 10 in the paper)."""

    label_smoothing: float = 0.0
    """Probability that the two answers of a pair are swapped (conservative DPO, Mitchell, 2023); only with `sigmoid`,
    at least 0 and below 0.5."""

    gamma: float | None = None
    """Only with `simpo`: target margin between the two rewards; default 0.5."""

    reference: Reference = "auto"
    """Where the reference's log-probabilities come from. `adapter_off`: the model with its adapter switched off, in a
    second forward pass at every step. `precomputed`: the model before training, in one pass over the data. `auto`:
    `adapter_off` if that is the model before training, else `precomputed`."""

    share_prompts: bool = True
    """Compute a prompt once for both of its answers, if a probe of the loaded model shows that this changes nothing."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"model.preference.beta: must be above 0 (got {self.beta})")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"model.preference.label_smoothing: must be in [0, 0.5) (got {self.label_smoothing})")
        if self.label_smoothing and self.loss != "sigmoid":
            raise UserError(f"model.preference.label_smoothing: only valid with loss: sigmoid (got {self.loss})")
        if self.gamma is not None and self.loss != "simpo":
            raise UserError(f"model.preference.gamma: only valid with loss: simpo (got {self.loss})")
        if self.gamma is not None and self.gamma < 0:
            raise UserError(f"model.preference.gamma: must be at least 0 (got {self.gamma})")
        if self.reference != "auto" and not self.has_reference:
            raise UserError(
                f"model.preference.reference: {self.reference}, but the loss {self.loss} has no reference model; "
                "remove it"
            )

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the model with a reference model."""
        return self.loss not in _WITHOUT_REFERENCE


class PairScores(NamedTuple):
    """Losses and rewards of P pairs."""

    losses: torch.Tensor
    """Loss of each pair, (P,)."""

    chosen_rewards: torch.Tensor
    """Implicit rewards of the chosen answers, detached, (P,)."""

    rejected_rewards: torch.Tensor
    """Implicit rewards of the rejected answers, detached, (P,)."""


def score_pairs(
    config: PreferenceConfig, policy: torch.Tensor, reference: torch.Tensor | None, lengths: torch.Tensor
) -> PairScores:
    """Return the loss and the rewards of each pair, (P,).

    Args:
        config: The loss.
        policy: Log-probabilities of the chosen and the rejected answers under the model, sums over tokens, (P, 2).
        reference: Log-probabilities of the same answers under the reference model, (P, 2); `None` for losses without.
        lengths: Number of supervised tokens of the answers, (P, 2).

    Raises:
        ValueError: If the loss needs a reference and `reference` is `None`.
    """
    if not config.has_reference:
        means = policy / lengths
        losses = _simpo(config, means) if config.loss == "simpo" else _orpo(config, means)
        return _scores(losses, config.beta * means)
    if reference is None:
        raise ValueError(f"the loss {config.loss} needs log-probabilities of a reference model")
    log_ratios = policy - reference
    return _scores(_with_reference(config, log_ratios[:, 0] - log_ratios[:, 1]), config.beta * log_ratios)


def _scores(losses: torch.Tensor, rewards: torch.Tensor) -> PairScores:
    rewards = rewards.detach()
    return PairScores(losses, rewards[:, 0], rewards[:, 1])


def _with_reference(config: PreferenceConfig, difference: torch.Tensor) -> torch.Tensor:
    """Return the losses for the differences between two log-ratios, (P,) → (P,)."""
    margin = config.beta * difference
    if config.loss == "ipo":
        # Equation 17 of the paper, on sums over tokens as there.
        return (difference - 1 / (2 * config.beta)) ** 2
    if config.loss == "hinge":
        return torch.relu(1 - margin)
    wrong = config.label_smoothing
    losses = -(1 - wrong) * F.logsigmoid(margin)
    return losses - wrong * F.logsigmoid(-margin) if wrong else losses


def _simpo(config: PreferenceConfig, means: torch.Tensor) -> torch.Tensor:
    """Equation 6 of SimPO, on mean log-probabilities per token, (P, 2)."""
    gamma = _DEFAULT_GAMMA if config.gamma is None else config.gamma
    return -F.logsigmoid(config.beta * (means[:, 0] - means[:, 1]) - gamma)


def _orpo(config: PreferenceConfig, means: torch.Tensor) -> torch.Tensor:
    """Equation 6 of ORPO: the chosen answer's loss per token, and beta times the odds-ratio loss, (P, 2) → (P,)."""
    # log(p / (1 - p)); a probability that rounds to 1 has infinite odds.
    means = means.clamp(max=-torch.finfo(means.dtype).eps)
    log_odds = means - torch.log(-torch.expm1(means))
    return -means[:, 0] - config.beta * F.logsigmoid(log_odds[:, 0] - log_odds[:, 1])
