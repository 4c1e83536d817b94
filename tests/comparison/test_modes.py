from __future__ import annotations

from typing import Any

import pytest

from sft_lightning.comparison.modes import (
    ALL_MODES,
    DecodingOptions,
    answers_per_prompt,
    decoding_configs,
    parse_modes,
)
from sft_lightning.errors import UserError
from sft_lightning.models.generation.config import GenerationConfig


def test_the_defaults_of_every_mode_make_that_mode() -> None:
    configs = decoding_configs(ALL_MODES, DecodingOptions())
    assert {name: config.mode for name, config in configs.items()} == {name: name for name in ALL_MODES}


def test_modes_are_kept_in_order_without_repetition() -> None:
    assert parse_modes([]) == ["greedy"]
    assert parse_modes(["beam", "greedy", "beam"]) == ["beam", "greedy"]
    assert parse_modes(["beam", "all"])[:2] == ["beam", "greedy"]
    assert len(parse_modes(["all"])) == 6


def test_parameters_reach_only_the_modes_that_have_them() -> None:
    options = DecodingOptions(num_beams=6, num_beam_groups=3, diversity_penalty=0.5, top_k=7, temperature=0.7)
    configs = decoding_configs(["diverse_beam", "sampling", "contrastive", "greedy"], options)
    assert configs["diverse_beam"] == GenerationConfig(
        max_new_tokens=100, num_beams=6, num_beam_groups=3, diversity_penalty=0.5
    )
    assert configs["sampling"] == GenerationConfig(max_new_tokens=100, top_k=7, temperature=0.7)
    assert configs["contrastive"] == GenerationConfig(max_new_tokens=100, top_k=7, penalty_alpha=0.6)
    assert configs["greedy"] == GenerationConfig(max_new_tokens=100)


def test_diverse_beam_has_one_group_per_beam_by_default() -> None:
    [config] = decoding_configs(["diverse_beam"], DecodingOptions(num_beams=6)).values()
    assert config.num_beam_groups == 6


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        (
            "greedy",
            {"penalty_alpha": 0.6},
            "--penalty_alpha: 0.6 has no effect in greedy; add --mode contrastive",
        ),
        ("sampling", {"temperature": 0.0}, "makes this greedy"),
        ("beam", {"num_beams": 1}, "makes this greedy"),
        ("diverse_beam", {"num_beams": 4, "num_beam_groups": 3}, "must divide"),
        ("contrastive", {"top_k": 1}, "top_k of at least 2"),
        ("contrastive", {"penalty_alpha": 0.0}, "makes this greedy"),
    ],
)
def test_parameters_that_contradict_the_mode_are_refused(mode: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        decoding_configs([mode], DecodingOptions(**options))


def test_an_unknown_mode_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="Did you mean 'greedy'"):
        parse_modes(["gready"])


def test_the_number_of_answers_is_limited_by_the_mode() -> None:
    assert answers_per_prompt(GenerationConfig(), 3) == 1
    assert answers_per_prompt(GenerationConfig(temperature=1.0), 3) == 3
    assert answers_per_prompt(GenerationConfig(num_beams=4), 3) == 3
    with pytest.raises(UserError, match="need at least as many --num_beams"):
        answers_per_prompt(GenerationConfig(num_beams=2), 3)
    with pytest.raises(UserError, match="at least 1"):
        answers_per_prompt(GenerationConfig(num_beams=2), 0)
