from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from sft_lightning.models.probing import (
    PROBE_TEXTS,
    logits_of,
    mean_divergence,
    next_token_log_probs,
    random_ids,
    tokenize_texts,
    truncate_rows,
)


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=16, **sizes, num_attention_heads=2, num_key_value_heads=2)
    built: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return built


def test_random_ids_are_the_same_at_every_call_and_within_the_vocabulary() -> None:
    first, again = (random_ids(7, rows=3, length=20) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (3, 20)
    assert 0 <= int(first.min()) <= int(first.max()) < 7


def test_random_ids_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    random_ids(7, rows=1, length=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_built_in_texts_are_tokenized_one_by_one(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = tokenize_texts(tokenizer)
    assert len(rows) == len(PROBE_TEXTS)
    assert rows[0] == tokenizer(PROBE_TEXTS[0]).input_ids


@pytest.mark.parametrize(
    ("max_tokens", "max_length", "lengths"),
    [(100, 100, [5, 4, 3]), (100, 4, [4, 4, 3]), (7, 100, [5, 2]), (6, 100, [5]), (5, 5, [5])],
)
def test_rows_are_truncated_to_a_length_and_a_total(max_tokens: int, max_length: int, lengths: list[int]) -> None:
    rows = [[1] * 5, [2] * 4, [3], [4] * 3]  # a row of one token predicts nothing
    assert [len(row) for row in truncate_rows(rows, max_tokens, max_length)] == lengths


def test_logits_are_float32_whatever_the_type_of_the_model(model: PreTrainedModel) -> None:
    logits = logits_of(model, random_ids(16, rows=2, length=3))
    assert (logits.dtype, logits.shape, logits.requires_grad) == (torch.float32, (2, 3, 16), False)


def test_log_probabilities_are_those_of_the_next_token_for_each_row(model: PreTrainedModel) -> None:
    long, short = next_token_log_probs(model, [[1, 2, 3], [4]])
    assert (long.shape, short.shape) == ((3, 16), (1, 16))
    torch.testing.assert_close(long.exp().sum(-1), torch.ones(3))
    torch.testing.assert_close(long, logits_of(model, torch.tensor([[1, 2, 3]]))[0].log_softmax(-1))


def test_the_divergence_is_the_mean_over_all_positions_in_nats() -> None:
    reference = [torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()]
    other = [torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()]
    expected = [
        0.0,
        0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5),
        0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75),
    ]
    assert mean_divergence(reference, other) == pytest.approx(sum(expected) / 3)
    assert mean_divergence(reference, reference) == 0.0


def test_padding_rows_of_the_other_vocabulary_do_not_count() -> None:
    reference = [torch.tensor([[0.5, 0.5]]).log()]
    padded = [torch.tensor([[0.25, 0.25, 0.5]]).log()]
    assert mean_divergence(reference, padded) == pytest.approx(0.0)
