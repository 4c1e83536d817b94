"""Which modules are sharded together, and what is in the way."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.strategies.fsdp2.groups import check_one_trainable_type, decoder_layers, shard_groups
from sft_lightning.strategies.full_tensors import full_parameters, shard_like


def llama(**changes: object) -> PreTrainedModel:
    values = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        LlamaConfig(**values, num_key_value_heads=2, num_hidden_layers=3, **changes)
    )
    return model


def test_the_layers_are_found() -> None:
    model = llama()
    assert decoder_layers(model) == list(model.model.layers)
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))
    assert decoder_layers(gpt2) == list(gpt2.transformer.h)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match="Linear has no list of layers; use ddp"):
        decoder_layers(nn.Linear(2, 2))


def test_an_untied_embedding_is_a_group_and_a_tied_one_stays_with_the_head() -> None:
    model = llama()
    assert shard_groups(model) == [*model.model.layers, model.model.embed_tokens, model]
    tied = llama(tie_word_embeddings=True)
    assert shard_groups(tied) == [*tied.model.layers, tied]


def test_weights_of_two_types_that_train_in_one_layer_are_refused_by_name() -> None:
    layer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16))
    with pytest.raises(UserError, match=r"float32 \(0\.bias\), bfloat16 \(1\.bias\).*set model\.dtype: float32"):
        check_one_trainable_type(layer)
    layer[1].requires_grad_(False)
    check_one_trainable_type(layer)


def test_full_parameters_stand_in_everywhere_and_go_again() -> None:
    model = llama(tie_word_embeddings=True)
    before = model.lm_head.weight
    stand_in = torch.ones_like(before)
    with full_parameters(model, {"model.embed_tokens.weight": stand_in}):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.state_dict()["lm_head.weight"], stand_in)
    assert model.lm_head.weight is model.model.embed_tokens.weight is before


def test_only_sharded_parameters_shard_their_state() -> None:
    tensor = torch.ones(2)
    assert shard_like(torch.ones(2), tensor) is tensor
    assert shard_like(torch.ones(2), 3) == 3
