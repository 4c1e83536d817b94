"""Which modules FSDP2 shards together, and which models it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.strategies.fsdp2.groups import check_one_trainable_type, decoder_layers, shard_groups


def llama(**changes: object) -> PreTrainedModel:
    values = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        LlamaConfig(**values, num_key_value_heads=2, num_hidden_layers=3, **changes)
    )
    return model


def test_decoder_layers_are_found() -> None:
    model = llama()
    assert decoder_layers(model) == list(model.model.layers)
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))
    assert decoder_layers(gpt2) == list(gpt2.transformer.h)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match="Linear has no list of layers; use ddp"):
        decoder_layers(nn.Linear(2, 2))


def test_an_untied_embedding_is_a_group_and_a_tied_one_is_gathered_with_the_head() -> None:
    model = llama()
    assert shard_groups(model) == [*model.model.layers, model.model.embed_tokens, model]
    tied = llama(tie_word_embeddings=True)
    assert shard_groups(tied) == [*tied.model.layers, tied]


def test_a_layer_that_trains_weights_of_two_types_is_refused_by_name() -> None:
    layer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16))
    with pytest.raises(UserError, match=r"float32 \(0\.bias\), bfloat16 \(1\.bias\).*set model\.dtype: float32"):
        check_one_trainable_type(layer)
    layer[1].requires_grad_(False)
    check_one_trainable_type(layer)
