from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sft_lightning.models.generation.diverse_beam import choose_next_tokens, diverse_beam_search

PAD, STOP = 0, 2


@pytest.fixture(scope="module")
def model(model_dir: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir)
    return loaded.eval()


@torch.no_grad()
def search(
    model: PreTrainedModel,
    rows: list[list[int]],
    beams: int,
    groups: int = 1,
    penalty: float = 1.0,
    tokens: int = 5,
    stops: tuple[int, ...] = (STOP,),
) -> list[list[list[int]]]:
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    found: list[list[list[int]]] = diverse_beam_search(
        model,
        ids,
        mask,
        num_beams=beams,
        num_beam_groups=groups,
        diversity_penalty=penalty,
        max_new_tokens=tokens,
        stop_token_ids=stops,
        pad_token_id=PAD,
    ).tolist()
    return found


def test_one_group_is_the_beam_search_of_transformers(model: PreTrainedModel) -> None:
    ids = torch.tensor([[1, 40, 50]])
    expected = model.generate(
        ids, max_new_tokens=5, num_beams=4, num_return_sequences=4, do_sample=False, eos_token_id=STOP, pad_token_id=PAD
    )
    assert search(model, ids.tolist(), beams=4) == [expected[:, 3:].tolist()]


@torch.no_grad()
def test_with_a_beam_for_every_answer_the_best_answer_is_found() -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=1.0,
    )
    tiny = AutoModelForCausalLM.from_config(config).eval()
    scores = {}
    for answer in itertools.product(range(5), repeat=3):
        end = answer.index(STOP) + 1 if STOP in answer else 3
        text = torch.tensor([[1, 3, *answer[:end]]])
        each = tiny(text).logits[0].log_softmax(-1)[1:-1].gather(1, text[0, 2:, None])
        scores[(*answer[:end], *[PAD] * (3 - end))] = each.sum().item() / end
    [found] = search(tiny, [[1, 3]], beams=125, tokens=3)
    assert tuple(found[0]) == max(scores, key=scores.__getitem__)


def test_groups_avoid_tokens_of_earlier_groups_at_the_same_step(model: PreTrainedModel) -> None:
    [together] = search(model, [[1, 40, 50]], beams=3, groups=3, penalty=0.0)
    assert together[0] == together[1] == together[2]
    [apart] = search(model, [[1, 40, 50]], beams=3, groups=3, penalty=100.0)
    assert all(len(set(tokens)) == 3 for tokens in zip(*apart, strict=True))


def test_the_best_of_each_group_come_first(model: PreTrainedModel) -> None:
    [found] = search(model, [[1, 40, 50]], beams=4, groups=2, penalty=100.0)
    [alone] = search(model, [[1, 40, 50]], beams=2)
    assert [found[0], found[2]] == alone  # the first group knows nothing of the second


def test_padded_prompts_are_answered_as_each_alone(model: PreTrainedModel) -> None:
    rows = [[1, 40, 50, 60, 70], [1, 41]]
    assert search(model, rows, 4, 2) == [search(model, [row], 4, 2)[0] for row in rows]


def test_a_beam_that_has_ended_keeps_its_score_and_is_followed_by_padding(model: PreTrainedModel) -> None:
    [[best, *_]] = search(model, [[1, 40, 50]], beams=2)
    [found] = search(model, [[1, 40, 50]], beams=2, stops=(best[1],))
    ended = [row for row in found if best[1] in row[:2]]
    assert ended
    assert all(set(row[row.index(best[1]) + 1 :]) <= {PAD} for row in ended)


def test_the_penalty_counts_how_often_a_token_was_chosen_at_this_step_and_not_by_ended_beams() -> None:
    log_probabilities = torch.tensor([[[[-1.0, -1.5, -9.0]]] * 3])
    scores, done = torch.zeros(1, 3, 1), torch.zeros(1, 3, 1, dtype=torch.bool)
    totals, parents, tokens = choose_next_tokens(scores, log_probabilities, done, 0.4)
    assert tokens.flatten().tolist() == [0, 0, 1]  # -1, then -1.4, then -1.8 against -1.5
    assert totals.flatten().tolist() == pytest.approx([-1.0, -1.4, -1.5])
    assert parents.flatten().tolist() == [0, 0, 0]
    ended = torch.tensor([[[True], [False], [False]]])
    _, _, tokens = choose_next_tokens(scores, log_probabilities, ended, 0.6)
    assert tokens.flatten().tolist() == [0, 0, 1]
