from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.targets import resolve_preset
from sft_lightning.models.adapters.wrapping import add_adapter


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    values = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**values, **changes}))


def trainable_sizes(model: torch.nn.Module) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("preset", "model_type", "expected"),
    [
        ("attention", "llama", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("mlp", "llama", ["down_proj", "gate_proj", "up_proj"]),
        ("attention", "gpt2", ["attn.c_proj", "c_attn"]),
        ("mlp", "gpt2", ["c_fc", "mlp.c_proj"]),
        ("attention", "gpt_neox", ["dense", "query_key_value"]),
        ("mlp", "gpt_neox", ["dense_4h_to_h", "dense_h_to_4h"]),
        ("mlp", "opt", ["fc1", "fc2"]),
        ("attention", "bloom", ["dense", "query_key_value"]),
        ("attention", "falcon", ["dense", "query_key_value"]),
        ("attention", "phi3", ["o_proj", "qkv_proj"]),
        ("mamba", "mamba", ["in_proj"]),
        ("all-linear", "mamba", ["in_proj"]),
    ],
)
def test_a_preset_finds_its_modules_in_every_family(preset: str, model_type: str, expected: list[str]) -> None:
    changes: dict[str, Any] = {"pad_token_id": 0}
    if model_type != "mamba":
        changes |= {"intermediate_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 16, "n_inner": 32}
    model = tiny_model(model_type, **changes)
    assert sorted(resolve_preset(model, preset)) == sorted(expected)
    assert trainable_sizes(add_adapter(model, AdapterConfig(r=2, target_modules=preset)))


def test_embeddings_of_mamba_are_adapted_unless_they_are_tied() -> None:
    untied = tiny_model("mamba", tie_word_embeddings=False)
    assert sorted(resolve_preset(untied, "mamba")) == ["embeddings", "in_proj"]


def test_an_adapter_on_tied_embeddings_is_refused() -> None:
    tied = tiny_model("llama", intermediate_size=32, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"shares its matrix with lm_head.*modules_to_save"):
        add_adapter(tied, AdapterConfig(target_modules=["q_proj", "embed_tokens"]))


@pytest.mark.parametrize("targets", [["out_proj"], ["x_proj", "in_proj"], r".*(in|dt)_proj"])
def test_a_layer_that_mamba_never_calls_is_refused(targets: list[str] | str) -> None:
    with pytest.raises(UserError, match="without calling the module"):
        add_adapter(tiny_model("mamba"), AdapterConfig(target_modules=targets))
