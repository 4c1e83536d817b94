from __future__ import annotations

from typing import Any

import pytest
from peft import IA3Config

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 0}, r"model\.adapter\.r:"),
        ({"dropout": 1.0}, r"model\.adapter\.dropout"),
        ({"lora_plus_ratio": 0.0}, r"model\.adapter\.lora_plus_ratio"),
        ({"init": "pisa"}, "Did you mean 'pissa'"),
        ({"init": "eva"}, "because it measures the model on data first"),
        ({"init": "pissa_niter_4"}, "use 'pissa'"),
        ({"base_lr": 1e-4}, "only valid with model.adapter.only_adapter: false"),
        ({"base_lr": 0.0, "only_adapter": False}, "must be above 0"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, r"model\.adapter\.layers_to_transform"),
        ({"drop_modules_to_save": True}, r"only valid with model\.adapter\.path"),
        (
            {"r": 4, "use_dora": True, "peft_config": IA3Config()},
            "cannot be combined with r, use_dora; set them",
        ),
        ({"path": "x", "peft_config": IA3Config()}, "cannot be combined with path"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        AdapterConfig(**config)
