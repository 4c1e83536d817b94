from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft_lightning.errors import UserError
from sft_lightning.models.attention import PACKED
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


def test_the_bound_is_that_of_each_documents_own_length(model_dir: Path) -> None:
    added = noise(model_dir, document_lengths=[[4, 96]]).abs()
    for part, length in ((added[:4], 4), (added[4:], 96)):
        bound = 5.0 / math.sqrt(length * 32)
        assert 0.9 * bound < float(part.max()) <= bound * (1 + 1e-6)


def test_without_documents_the_row_is_one(model_dir: Path) -> None:
    assert float(noise(model_dir, document_lengths=None).abs().max()) <= 5.0 / math.sqrt(100 * 32) * (1 + 1e-6)


def test_the_noise_comes_from_torchs_generator(model_dir: Path) -> None:
    first, second = (noise(model_dir, document_lengths=[[100]]) for _ in range(2))
    assert torch.equal(first, second)
    assert first.any()


def test_evaluation_has_no_noise(model_dir: Path) -> None:
    assert not noise(model_dir, document_lengths=[[100]], training=False).any()


@pytest.mark.parametrize("alpha", [0.0, -5.0])
def test_the_strength_must_be_positive(alpha: float) -> None:
    with pytest.raises(UserError, match=r"model\.neftune_alpha"):
        EmbeddingNoise(alpha)
