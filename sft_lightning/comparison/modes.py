"""Options of the command → how each mode generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from sft_lightning.errors import UserError, one_of
from sft_lightning.models.generation.config import DecodingMode, GenerationConfig

ALL_MODES: tuple[DecodingMode, ...] = get_args(DecodingMode)


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """What the user set; `None` takes the default of each mode that uses it."""

    max_new_tokens: int = 100
    """Tokens per answer at most."""

    temperature: float | None = None
    """Of sampling and beam_sampling (default: 1)."""

    top_k: int | None = None
    """Sample among this many tokens (default: all); candidates of contrastive (default: 4)."""

    top_p: float | None = None
    """Sample among the most likely tokens that together have this probability (default: 1)."""

    repetition_penalty: float | None = None
    """Divides logits of tokens that have occurred (default: 1, none)."""

    num_beams: int | None = None
    """Beams of the beam searches (default: 4)."""

    num_beam_groups: int | None = None
    """Groups of diverse_beam (default: a group a beam)."""

    diversity_penalty: float | None = None
    """What a group pays for a token that an earlier one chose (default: 1)."""

    penalty_alpha: float | None = None
    """Of contrastive: 0 is greedy, 1 only avoids likeness (default: 0.6)."""

    seed: int = 0
    """Seed of the sampling."""


DEFAULTS: Mapping[DecodingMode, Mapping[str, Any]] = {
    "greedy": {"repetition_penalty": 1.0},
    "sampling": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
    "beam": {"num_beams": 4, "repetition_penalty": 1.0},
    "beam_sampling": {"num_beams": 4, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
    "diverse_beam": {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 1.0},
    "contrastive": {"top_k": 4, "penalty_alpha": 0.6},
}
"""The parameters that each mode has, and their defaults; contrastive's are DeepSpeed-Chat's (`prompt_eval.py`)."""

_COMMON = ("max_new_tokens", "seed")


def parse_modes(names: Sequence[str]) -> list[DecodingMode]:
    """Return the modes of `--mode`, each once, in order; `all` is every mode.

    Raises:
        UserError: If one is unknown.
    """
    chosen: list[DecodingMode] = []
    for name in names or ["greedy"]:
        found = list(ALL_MODES) if name == "all" else [mode for mode in ALL_MODES if mode == name]
        if not found:
            raise one_of("--mode", name, [*ALL_MODES, "all"])
        chosen += [mode for mode in found if mode not in chosen]
    return chosen


def decoding_configs(modes: Sequence[DecodingMode], options: DecodingOptions) -> dict[DecodingMode, GenerationConfig]:
    """Return how each mode generates.

    Raises:
        UserError: If a value is out of range, contradicts the mode, or is for none of the modes.
    """
    for name, value in vars(options).items():
        users = [mode for mode in ALL_MODES if name in DEFAULTS[mode]]
        if value is not None and name not in _COMMON and not set(users) & set(modes):
            raise UserError(
                f"--{name}: {value} has no part in {', '.join(modes)}; add --mode {' or --mode '.join(users)}"
            )
    return {mode: _config(mode, options) for mode in modes}


def answers_of(mode: DecodingMode, config: GenerationConfig, num_return_sequences: int) -> int:
    """Return how many answers a mode gives to each prompt: those asked for, or the one that there is.

    Raises:
        UserError: If a beam search has fewer beams.
    """
    if num_return_sequences < 1:
        raise UserError(f"--num_return_sequences: must be at least 1 (got {num_return_sequences})")
    most = config.max_answers()
    if most == 1:
        return 1
    if most is not None and num_return_sequences > most:
        raise UserError(f"--num_return_sequences: {num_return_sequences} answers need as many --num_beams ({most})")
    return num_return_sequences


def _config(mode: DecodingMode, options: DecodingOptions) -> GenerationConfig:
    given = {name: getattr(options, name) for name in DEFAULTS[mode] if getattr(options, name) is not None}
    values = {**DEFAULTS[mode], **given}
    if given.get("num_beams") is not None and "num_beam_groups" not in given and mode == "diverse_beam":
        values["num_beam_groups"] = given["num_beams"]  # a group a beam, unless said otherwise
    config = GenerationConfig(max_new_tokens=options.max_new_tokens, seed=options.seed, **values)
    if config.mode != mode:
        shown = ", ".join(f"--{name} {value}" for name, value in given.items())
        raise UserError(f"--mode {mode}: with {shown} this is {config.mode}; choose other values or that mode")
    return config
