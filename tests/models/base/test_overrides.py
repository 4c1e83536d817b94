from __future__ import annotations

import pytest
from transformers import AutoConfig

from sft_lightning.errors import UserError
from sft_lightning.models.base.overrides import ConfigOverrides, set_dropout


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"attention_dropout"}),
        ("gpt2", {"resid_pdrop", "embd_pdrop", "attn_pdrop"}),
        ("gpt_neo", {"resid_dropout", "embed_dropout", "attention_dropout"}),
        ("bloom", {"hidden_dropout", "attention_dropout"}),
        ("phi3", {"resid_pdrop", "embd_pdrop", "attention_dropout"}),
    ],
)
def test_every_dropout_of_the_model_is_set(model_type: str, fields: set[str]) -> None:
    config = AutoConfig.for_model(model_type)
    assert set(set_dropout(config, 0.3)) == fields
    assert {getattr(config, field) for field in fields} == {0.3}


def test_the_activation_dropout_of_opt_is_set() -> None:
    config = AutoConfig.for_model("opt")
    assert {"dropout", "attention_dropout"} <= set(set_dropout(config, 0.0))
    assert config.dropout == 0.0


def test_a_model_without_dropout_is_refused() -> None:
    with pytest.raises(UserError, match="mamba models have no dropout"):
        set_dropout(AutoConfig.for_model("mamba"), 0.1)


def test_a_probability_of_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.dropout"):
        ConfigOverrides(dropout=1.0)


def test_a_mixture_of_experts_returns_its_router_logits() -> None:
    config = AutoConfig.for_model("mixtral")
    ConfigOverrides().apply(config)
    assert config.output_router_logits
    dense = AutoConfig.for_model("llama")
    ConfigOverrides().apply(dense)
    assert not getattr(dense, "output_router_logits", False)
