from __future__ import annotations

import pytest

from sft_lightning.errors import UserError
from sft_lightning.models.generation.config import GenerationConfig


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens: must be at least 1 \(got 0\)"),
        ({"num_beams": 0}, "num_beams: must be at least 1"),
        ({"temperature": -1.0}, "temperature: must be at least 0"),
        ({"top_k": -1}, "top_k: must be at least 0"),
        ({"top_p": 0.0}, "top_p: must be above 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: must be above 0"),
        ({"penalty_alpha": 1.5}, r"penalty_alpha: must be in \[0, 1\]"),
        ({"penalty_alpha": 0.5}, r"requires a top_k of at least 2 \(got 0\)"),
        ({"penalty_alpha": 0.5, "top_k": 4, "num_beams": 2}, r"no beams \(got 2 in 1 groups\)"),
        (
            {"penalty_alpha": 0.5, "top_k": 4, "temperature": 1.0},
            "contrastive search cannot be combined",
        ),
        ({"num_beams": 4, "num_beam_groups": 3}, r"num_beam_groups: must divide num_beams \(got 3 and 4\)"),
        ({"num_beams": 4, "num_beam_groups": 2, "repetition_penalty": 1.1}, "diverse_beam search cannot be combined"),
    ],
)
def test_values_that_are_out_of_range_or_contradict_each_other_are_refused(values: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        GenerationConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "mode", "max_answers"),
    [
        ({}, "greedy", 1),
        ({"temperature": 1.0}, "sampling", None),
        ({"num_beams": 3}, "beam", 3),
        ({"num_beams": 3, "temperature": 1.0}, "beam_sampling", 3),
        ({"num_beams": 4, "num_beam_groups": 2}, "diverse_beam", 4),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive", 1),
    ],
)
def test_the_values_select_the_mode_and_its_most_answers(
    values: dict[str, float], mode: str, max_answers: int | None
) -> None:
    config = GenerationConfig(**values)  # type: ignore[arg-type]
    assert (config.mode, config.max_answers()) == (mode, max_answers)
