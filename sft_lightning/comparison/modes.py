"""Turn the options of `compare` into a generation config for each decoding mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from sft_lightning.errors import UserError, one_of
from sft_lightning.models.generation.config import DecodingMode, GenerationConfig

ALL_MODES: tuple[DecodingMode, ...] = get_args(DecodingMode)


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Decoding options; `None` stands for the default of the mode."""

    max_new_tokens: int = 100
    """Most tokens in an answer."""

    temperature: float | None = None
    """Temperature of sampling and beam_sampling (default: 1)."""

    top_k: int | None = None
    """Sample from the k most likely tokens (default: all); in contrastive, the number of candidates (default: 4)."""

    top_p: float | None = None
    """Sample from the most likely tokens whose probabilities sum to this (default: 1)."""

    repetition_penalty: float | None = None
    """Divides the logits of tokens that have occurred (default: 1, no penalty)."""

    num_beams: int | None = None
    """Number of beams in beam search (default: 4)."""

    num_beam_groups: int | None = None
    """Number of beam groups in diverse_beam (default: one group per beam)."""

    diversity_penalty: float | None = None
    """Penalty in diverse_beam for a token that an earlier group chose at the same step (default: 1)."""

    penalty_alpha: float | None = None
    """Weight of the similarity penalty in contrastive: 0 is greedy, 1 only avoids similarity (default: 0.6)."""

    seed: int = 0
    """Random seed of sampling."""


DEFAULTS: Mapping[DecodingMode, Mapping[str, Any]] = {
    "greedy": {"repetition_penalty": 1.0},
    "sampling": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
    "beam": {"num_beams": 4, "repetition_penalty": 1.0},
    "beam_sampling": {"num_beams": 4, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
    "diverse_beam": {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 1.0},
    "contrastive": {"top_k": 4, "penalty_alpha": 0.6},
}
"""Parameters of each mode with their defaults; those of contrastive are DeepSpeed-Chat's (`prompt_eval.py`)."""

_COMMON = ("max_new_tokens", "seed")


def parse_modes(names: Sequence[str]) -> list[DecodingMode]:
    """Return the modes that `--mode` names, in order and without repetition; `all` stands for every mode.

    Args:
        names: Values of `--mode`; none means greedy.

    Raises:
        UserError: If a name is unknown.
    """
    chosen: list[DecodingMode] = []
    for name in names or ["greedy"]:
        found = list(ALL_MODES) if name == "all" else [mode for mode in ALL_MODES if mode == name]
        if not found:
            raise one_of("--mode", name, [*ALL_MODES, "all"])
        chosen += [mode for mode in found if mode not in chosen]
    return chosen


def decoding_configs(modes: Sequence[DecodingMode], options: DecodingOptions) -> dict[DecodingMode, GenerationConfig]:
    """Return the generation config of each mode.

    Args:
        modes: The chosen modes.
        options: Decoding options as the user set them.

    Raises:
        UserError: If a value is out of range, contradicts the mode, or belongs to none of the modes.
    """
    for name, value in vars(options).items():
        users = [mode for mode in ALL_MODES if name in DEFAULTS[mode]]
        if value is not None and name not in _COMMON and not set(users) & set(modes):
            wanted = " or ".join(f"--mode {mode}" for mode in users)
            raise UserError(f"--{name}: {value} has no effect in {', '.join(modes)}; add {wanted}")
    return {mode: _config(mode, options) for mode in modes}


def answers_per_prompt(config: GenerationConfig, num_return_sequences: int) -> int:
    """Return how many answers a mode gives to each prompt: one in greedy and contrastive, else as many as wanted.

    Args:
        config: The mode's generation config.
        num_return_sequences: Answers that the user wants.

    Raises:
        UserError: If beam search has fewer beams than answers are wanted.
    """
    if num_return_sequences < 1:
        raise UserError(f"--num_return_sequences: must be at least 1 (got {num_return_sequences})")
    most = config.max_answers()
    if most == 1:
        return 1
    if most is not None and num_return_sequences > most:
        raise UserError(
            f"--num_return_sequences: {num_return_sequences} answers need at least as many --num_beams (got {most})"
        )
    return num_return_sequences


def _config(mode: DecodingMode, options: DecodingOptions) -> GenerationConfig:
    given = {name: getattr(options, name) for name in DEFAULTS[mode] if getattr(options, name) is not None}
    values = {**DEFAULTS[mode], **given}
    if given.get("num_beams") is not None and "num_beam_groups" not in given and mode == "diverse_beam":
        values["num_beam_groups"] = given["num_beams"]  # one group per beam unless the user sets the groups
    config = GenerationConfig(max_new_tokens=options.max_new_tokens, seed=options.seed, **values)
    if config.mode != mode:
        shown = ", ".join(f"--{name} {value}" for name, value in given.items())
        raise UserError(f"--mode {mode}: {shown} makes this {config.mode}; change the value or the mode")
    return config
