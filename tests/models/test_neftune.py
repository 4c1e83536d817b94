from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.models.neftune import EmbeddingNoise


def noise(model_dir: Path, *, document_lengths: list[list[int]] | None, training: bool = True) -> torch.Tensor:
    """What is added to the embeddings of a row of 100 tokens, (100, 32)."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation=PACKED).train(training)
    EmbeddingNoise(5.0).attach(model)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    options = {} if document_lengths is None else {"document_lengths": document_lengths}
    torch.manual_seed(1)
    model(input_ids=torch.arange(100)[None], use_cache=False, **options)
    ids, output = seen[0]
    return (output - model.get_input_embeddings().weight[ids])[0].detach()


def test_the_bound_depends_on_the_length_of_each_document(model_dir: Path) -> None:
    added = noise(model_dir, document_lengths=[[4, 96]]).abs()
    for part, length in ((added[:4], 4), (added[4:], 96)):
        bound = 5.0 / math.sqrt(length * 32)
        assert 0.9 * bound < float(part.max()) <= bound * (1 + 1e-6)


def test_without_document_lengths_the_row_is_one_document(model_dir: Path) -> None:
    assert float(noise(model_dir, document_lengths=None).abs().max()) <= 5.0 / math.sqrt(100 * 32) * (1 + 1e-6)


def test_the_noise_comes_from_torchs_generator(model_dir: Path) -> None:
    first, second = (noise(model_dir, document_lengths=[[100]]) for _ in range(2))
    assert torch.equal(first, second)
    assert first.any()


def test_evaluation_has_no_noise(model_dir: Path) -> None:
    assert not noise(model_dir, document_lengths=[[100]], training=False).any()


def test_the_noise_is_uniform_and_halves_where_documents_are_four_times_as_long(model_dir: Path) -> None:
    added = noise(model_dir, document_lengths=[[20, 80]])
    for part, length in ((added[:20], 20), (added[20:], 80)):
        bound = 5.0 / math.sqrt(length * 32)
        assert abs(float(part.mean())) < 0.1 * bound
        assert math.isclose(float(part.std()), bound / math.sqrt(3), rel_tol=0.1)


def test_a_document_gets_the_same_bound_packed_and_alone(model_dir: Path) -> None:
    packed = noise(model_dir, document_lengths=[[4, 96]])[:4].abs().max()
    assert float(packed) <= 5.0 / math.sqrt(4 * 32) * (1 + 1e-6)
    assert float(packed) > float(noise(model_dir, document_lengths=[[100]]).abs().max())


def test_noise_is_added_to_trainable_embeddings_and_changes_no_weight(model_dir: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, attn_implementation=PACKED)
    model = add_adapter(base, AdapterConfig(r=2, dropout=0.0, modules_to_save=["embed_tokens"])).train()
    ids, weights = torch.arange(100)[None], {name: p.clone() for name, p in model.named_parameters()}
    quiet = model(input_ids=ids).logits
    EmbeddingNoise(5.0).attach(base)
    loud = model(input_ids=ids, labels=ids, document_lengths=[[100]])
    loud.loss.backward()
    assert loud.logits.dtype == torch.bfloat16
    assert not torch.equal(loud.logits, quiet)
    assert torch.equal(model.eval()(input_ids=ids).logits, quiet)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    trained = model.get_base_model().get_input_embeddings().modules_to_save["default"].weight
    assert trained.grad is not None


@pytest.mark.parametrize("alpha", [0.0, -5.0])
def test_the_strength_must_be_positive(alpha: float) -> None:
    with pytest.raises(UserError, match=r"model\.neftune_alpha"):
        EmbeddingNoise(alpha)
