from __future__ import annotations

from typing import Any

import pytest

from sft_lightning.comparison.modes import (
    ALL_MODES,
    DecodingOptions,
    answers_of,
    decoding_configs,
    parse_modes,
)
from sft_lightning.errors import UserError
from sft_lightning.models.generation.config import GenerationConfig


def test_every_mode_is_what_its_name_says_by_default() -> None:
    configs = decoding_configs(ALL_MODES, DecodingOptions())
    assert {name: config.mode for name, config in configs.items()} == {name: name for name in ALL_MODES}


def test_modes_are_taken_once_and_in_order() -> None:
    assert parse_modes([]) == ["greedy"]
    assert parse_modes(["beam", "greedy", "beam"]) == ["beam", "greedy"]
    assert parse_modes(["beam", "all"])[:2] == ["beam", "greedy"]
    assert len(parse_modes(["all"])) == 6


def test_parameters_reach_the_modes_that_have_them() -> None:
    options = DecodingOptions(num_beams=6, num_beam_groups=3, diversity_penalty=0.5, top_k=7, temperature=0.7)
    configs = decoding_configs(["diverse_beam", "sampling", "contrastive", "greedy"], options)
    assert configs["diverse_beam"] == GenerationConfig(
        max_new_tokens=100, num_beams=6, num_beam_groups=3, diversity_penalty=0.5
    )
    assert configs["sampling"] == GenerationConfig(max_new_tokens=100, top_k=7, temperature=0.7)
    assert configs["contrastive"] == GenerationConfig(max_new_tokens=100, top_k=7, penalty_alpha=0.6)
    assert configs["greedy"] == GenerationConfig(max_new_tokens=100)


def test_diverse_beams_are_groups_of_one_unless_said_otherwise() -> None:
    [config] = decoding_configs(["diverse_beam"], DecodingOptions(num_beams=6)).values()
    assert config.num_beam_groups == 6


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("greedy", {"penalty_alpha": 0.6}, "--penalty_alpha: 0.6 has no part in greedy; add --mode contrastive"),
        ("sampling", {"temperature": 0.0}, "this is greedy"),
        ("beam", {"num_beams": 1}, "this is greedy"),
        ("diverse_beam", {"num_beams": 4, "num_beam_groups": 3}, "must divide"),
        ("contrastive", {"top_k": 1}, "top_k of at least 2"),
        ("contrastive", {"penalty_alpha": 0.0}, "this is greedy"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(mode: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        decoding_configs([mode], DecodingOptions(**options))


def test_an_unknown_mode_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'greedy'"):
        parse_modes(["gready"])


def test_modes_with_one_answer_give_one_and_beams_no_more_than_there_are() -> None:
    assert answers_of("greedy", GenerationConfig(), 3) == 1
    assert answers_of("sampling", GenerationConfig(temperature=1.0), 3) == 3
    assert answers_of("beam", GenerationConfig(num_beams=4), 3) == 3
    with pytest.raises(UserError, match="need as many --num_beams"):
        answers_of("beam", GenerationConfig(num_beams=2), 3)
    with pytest.raises(UserError, match="at least 1"):
        answers_of("beam", GenerationConfig(num_beams=2), 0)
