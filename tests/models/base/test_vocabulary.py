from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig, PreTrainedModel, PreTrainedTokenizerFast

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.base.vocabulary import (
    check_new_tokens_train,
    embedding_names,
    num_embeddings,
    resize_embeddings,
)
from sft_lightning.tokenizer import load_tokenizer

NEW = ["<tool>", "<think>", "newword"]


def tiny(rows: int, **changes: Any) -> PreTrainedModel:

    values = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=rows, **{**values, **changes}))


@pytest.fixture
def extended(model_dir: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(str(model_dir), tokens=NEW[2:], special_tokens=NEW[:2])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("multiple", [None, 8, 7])
def test_new_rows_are_the_mean_of_the_old_ones(
    tied: bool, multiple: int | None, extended: PreTrainedTokenizerFast
) -> None:
    rows = len(extended) - 3
    model = tiny(rows, tie_word_embeddings=tied)
    before = [m.weight.detach().clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    ids = resize_embeddings(model, extended, NEW, pad_to_multiple_of=multiple)
    assert ids == [rows, rows + 1, rows + 2]
    assert num_embeddings(model) == -(-len(extended) // (multiple or 1)) * (multiple or 1) == model.config.vocab_size
    for module, old in zip((model.get_input_embeddings(), model.get_output_embeddings()), before, strict=True):
        assert torch.equal(module.weight[:rows], old)
        assert torch.equal(module.weight[rows:], old.mean(0).expand(num_embeddings(model) - rows, -1))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied


def test_a_resized_model_loads_again(extended: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny(len(extended) - 3).eval()
    resize_embeddings(model, extended, NEW, pad_to_multiple_of=8)
    model.save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


def test_a_bias_of_the_head_grows_too(extended: PreTrainedTokenizerFast) -> None:

    rows = len(extended) - 3
    config = PhiConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    model.lm_head.bias.data.normal_()
    resize_embeddings(model, extended, NEW)
    assert torch.allclose(model.lm_head.bias[rows:], model.lm_head.bias[:rows].mean().expand(3))


def test_rows_are_neither_removed_nor_added_without_need(extended: PreTrainedTokenizerFast) -> None:
    model = tiny(len(extended) + 40)
    before = model.get_input_embeddings().weight
    ids = resize_embeddings(model, extended, NEW)
    assert model.get_input_embeddings().weight is before
    assert ids == extended.convert_tokens_to_ids([NEW[2], NEW[0], NEW[1]])


def test_a_foreign_tokenizer_is_refused_unless_asked_for(extended: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="resize_vocabulary"):
        resize_embeddings(tiny(50), extended, NEW)
    model = tiny(50)
    assert resize_embeddings(model, extended, [], any_size=True) == list(range(50, len(extended)))
    assert num_embeddings(model) == len(extended)


def test_a_multiple_below_one_is_refused(extended: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"model\.pad_to_multiple_of"):
        resize_embeddings(tiny(400), extended, [], pad_to_multiple_of=0)


@pytest.mark.parametrize(
    ("adapter", "learns"),
    [
        ({}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
        ({"trainable_token_indices": "added"}, True),
        ({"only_adapter": False}, True),
    ],
)
def test_new_tokens_on_a_frozen_embedding_are_refused(
    adapter: dict[str, Any], learns: bool, extended: PreTrainedTokenizerFast
) -> None:
    model = tiny(len(extended) - 3)
    names = embedding_names(model)
    ids = resize_embeddings(model, extended, NEW)
    add_adapter(model, AdapterConfig(r=2, **adapter), added_token_ids=ids)
    if learns:
        check_new_tokens_train(model, ids, names)
    else:
        with pytest.raises(UserError, match=r"modules_to_save: \[embed_tokens, lm_head\]"):
            check_new_tokens_train(model, ids, names)


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_rows_of_the_added_tokens_learn(tied: bool, extended: PreTrainedTokenizerFast) -> None:
    model = tiny(len(extended) - 3, tie_word_embeddings=tied)
    ids = resize_embeddings(model, extended, NEW)
    wrapped = add_adapter(model, AdapterConfig(r=2, trainable_token_indices="added"), added_token_ids=ids)
    batch = torch.tensor([[5, *ids, 6]])
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    wrapped(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    merged = wrapped.merge_and_unload()
    for module in (merged.get_input_embeddings(), merged.get_output_embeddings()):
        mean = module.weight[: ids[0]].mean(0)
        assert all(not torch.allclose(module.weight[i], mean, atol=1e-6) for i in ids)
    original = tiny(len(extended) - 3, tie_word_embeddings=tied).get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight[: ids[0]], original)


def test_training_added_tokens_requires_added_tokens(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with pytest.raises(UserError, match=r"requires new tokens, but model\.add_tokens adds none"):
        add_adapter(model, AdapterConfig(trainable_token_indices="added"))
