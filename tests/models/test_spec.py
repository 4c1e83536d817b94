from __future__ import annotations

from typing import Any

import pytest

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.rope import RopeScalingConfig
from sft_lightning.models.spec import ModelSpec


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quantization": QuantizationConfig()}, r"model\.quantization: .*set model\.adapter too"),
        (
            {"trainable": ["lm_head"], "adapter": AdapterConfig()},
            r"model\.trainable: .*model\.adapter\.modules_to_save",
        ),
        ({"dropout": 1.0}, r"model\.dropout: must be in \[0, 1\) \(got 1\.0\)"),
    ],
)
def test_keys_that_contradict_each_other_or_are_out_of_range_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelSpec(**keys)


def test_a_quantized_base_with_an_adapter_is_accepted() -> None:
    assert ModelSpec(quantization=QuantizationConfig(), adapter=AdapterConfig()).trainable is None


def test_added_tokens_are_the_plain_and_the_special_ones_in_that_order() -> None:
    assert ModelSpec().added_tokens == []
    assert ModelSpec(add_tokens=["<a>"], add_special_tokens=["<b>"]).added_tokens == ["<a>", "<b>"]


def test_overrides_hold_what_changes_the_models_own_configuration() -> None:
    rope = RopeScalingConfig(type="linear", factor=2.0)
    overrides = ModelSpec(rope_scaling=rope, dropout=0.1).overrides
    assert (overrides.rope_scaling, overrides.dropout) == (rope, 0.1)
