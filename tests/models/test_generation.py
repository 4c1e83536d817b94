from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sft_lightning.errors import UserError
from sft_lightning.models.attention import PACKED
from sft_lightning.models.generation import GenerationConfig, generate

PROMPTS = ["<s>What is the opposite of hot?", "<s>Hi"]


@pytest.fixture
def model(model_dir: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation=PACKED)
    return loaded.train()


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], stop: int = 2, **c: float
) -> list[str]:
    config = GenerationConfig(max_new_tokens=8, **c)  # type: ignore[arg-type]
    return generate(model, tokenizer, prompts, stop_token_id=stop, config=config)


def test_prompts_of_different_lengths_are_answered_as_each_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    together = answers(model, tokenizer, PROMPTS)
    assert together == [answers(model, tokenizer, [prompt])[0] for prompt in PROMPTS]
    assert all(together)


def test_an_answer_ends_before_the_stop_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    [whole] = answers(model, tokenizer, PROMPTS[:1])
    second = tokenizer(whole, add_special_tokens=False).input_ids[1]
    [cut] = answers(model, tokenizer, PROMPTS[:1], stop=second)
    assert whole.startswith(cut)
    assert len(cut) < len(whole)


def test_the_model_and_the_random_state_are_left_as_they_were(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    state = torch.get_rng_state()
    first = answers(model, tokenizer, PROMPTS, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.config._attn_implementation == PACKED
    assert first == answers(model, tokenizer, PROMPTS, temperature=1.0)


def test_no_prompts_give_no_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert answers(model, tokenizer, []) == []


@pytest.mark.parametrize("values", [{"max_new_tokens": 0}, {"temperature": -1.0}])
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserError):
        GenerationConfig(**values)  # type: ignore[arg-type]
