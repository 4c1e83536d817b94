from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, MambaConfig, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.generation.contrastive import choose_candidates, contrastive_search

PAD, STOP = 0, 2


@pytest.fixture(scope="module")
def model(model_dir: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir)
    return loaded.eval()


@torch.no_grad()
def search(model: PreTrainedModel, rows: list[list[int]], alpha: float, stop: int = STOP) -> list[list[int]]:
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    found = contrastive_search(
        model,
        ids,
        mask,
        top_k=4,
        penalty_alpha=alpha,
        max_new_tokens=6,
        stop_token_ids=[stop],
        pad_token_id=PAD,
    )
    return [[int(token) for token in row] for row in found]


@torch.no_grad()
def by_definition(model: PreTrainedModel, row: list[int], alpha: float, top_k: int = 4, tokens: int = 6) -> list[int]:
    """The paper's equation, without a cache, a batch or a matrix."""
    text = list(row)
    for _ in range(tokens):
        probabilities, candidates = model(torch.tensor([text])).logits[0, -1].softmax(-1).topk(top_k)
        scores = []
        for probability, candidate in zip(probabilities.tolist(), candidates.tolist(), strict=True):
            states = model(torch.tensor([[*text, candidate]]), output_hidden_states=True).hidden_states[-1][0]
            likeness = F.cosine_similarity(states[-1:], states[:-1]).max().item()
            scores.append((1 - alpha) * probability - alpha * likeness)
        text.append(candidates[scores.index(max(scores))].item())
    return text[len(row) :]


@pytest.mark.parametrize("alpha", [0.1, 0.6, 0.9])
def test_every_token_maximizes_the_papers_equation(model: PreTrainedModel, alpha: float) -> None:
    [found] = search(model, [[1, 40, 50, 60]], alpha)
    assert found == by_definition(model, [1, 40, 50, 60], alpha)


def test_without_a_penalty_contrastive_search_is_greedy(model: PreTrainedModel) -> None:
    greedy = model.generate(torch.tensor([[1, 40, 50]]), max_new_tokens=6, do_sample=False, eos_token_id=STOP)
    assert search(model, [[1, 40, 50]], alpha=0.0) == greedy[:, 3:].tolist()


def test_padded_prompts_are_answered_as_each_alone(model: PreTrainedModel) -> None:
    rows = [[1, 40, 50, 60, 70], [1, 41]]
    assert search(model, rows, 0.6) == [search(model, [row], 0.6)[0] for row in rows]


def test_only_padding_follows_the_stop_token(model: PreTrainedModel) -> None:
    rows = [[1, 40, 50, 60], [1, 41]]
    first, second = search(model, rows, 0.6)
    stopped, other = search(model, rows, 0.6, stop=first[1])
    assert stopped == [*first[:2], PAD, PAD, PAD, PAD]
    assert other == second
    assert first[1] not in second


def test_padding_does_not_count_for_the_similarity() -> None:
    context = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    states = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    probabilities = torch.tensor([[0.5, 0.5]])
    assert choose_candidates(probabilities, states, context, torch.tensor([[True, True]]), 0.5).tolist() == [1]
    assert choose_candidates(probabilities, states, context, torch.tensor([[False, True]]), 0.5).tolist() == [0]


def test_a_model_without_a_key_value_cache_is_refused() -> None:
    config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)
    mamba = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match=r"require a key-value cache .*; use another mode"):
        search(mamba, [[1, 4, 5]], 0.6)
