from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from sft_lightning.errors import UserError
from sft_lightning.training.spec import PreferenceSpec, TrainingSpec


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"neftune_alpha": 0.0}, r"model\.neftune_alpha: must be above 0"),
        ({"gradient_checkpointing": 0}, r"model\.gradient_checkpointing: must be at least 1"),
        ({"max_nonfinite_losses": 0}, r"model\.max_nonfinite_losses: must be at least 1.*got 0"),
    ],
)
def test_a_value_out_of_range_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainingSpec(**keys)


def test_no_limit_no_noise_and_no_recomputing_are_accepted() -> None:
    TrainingSpec(max_nonfinite_losses=None, neftune_alpha=None, gradient_checkpointing=False)


def test_preference_training_adds_one_key() -> None:
    keys = [[field.name for field in fields(spec)] for spec in (TrainingSpec, PreferenceSpec)]
    assert keys[1] == [*keys[0], "preference"]
