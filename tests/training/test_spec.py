from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from sft_lightning.errors import UserError
from sft_lightning.training.module import model_from_keys
from sft_lightning.training.preference.module import preference_model_from_keys
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


@pytest.mark.parametrize(
    ("make", "spec"), [(model_from_keys, TrainingSpec), (preference_model_from_keys, PreferenceSpec)]
)
def test_the_command_line_has_every_field_and_nothing_else(make: Callable[..., Any], spec: type[TrainingSpec]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(make, "model")
    assert {*vars(parser.get_defaults().model)} == {field.name for field in fields(spec)}
