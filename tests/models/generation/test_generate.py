from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sft_lightning.errors import UserError
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.models.generation.config import GenerationConfig
from sft_lightning.models.generation.generate import generate, generate_ids

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


def test_a_family_without_sdpa_answers_with_eager_attention(tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma2", vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=8, pad_token_id=0, **sizes
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)
    together = answers(model, tokenizer, PROMPTS)
    assert together == [answers(model, tokenizer, [prompt])[0] for prompt in PROMPTS]
    assert model.config._attn_implementation == PACKED


def test_an_answer_ends_before_the_stop_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    [whole] = answers(model, tokenizer, PROMPTS[:1])
    second = tokenizer(whole, add_special_tokens=False).input_ids[1]
    [cut] = answers(model, tokenizer, PROMPTS[:1], stop=second)
    assert whole.startswith(cut)
    assert len(cut) < len(whole)


def test_the_model_and_the_random_state_do_not_change(
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


MODES: dict[str, dict[str, float]] = {
    "greedy": {},
    "sampling": {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
    "beam": {"num_beams": 3},
    "beam_sampling": {"num_beams": 3, "temperature": 1.0},
    "diverse_beam": {"num_beams": 4, "num_beam_groups": 2},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
}


@pytest.mark.parametrize("mode", MODES)
def test_the_values_select_a_mode_that_generates_answers(model: PreTrainedModel, mode: str) -> None:
    config = GenerationConfig(max_new_tokens=5, **MODES[mode])  # type: ignore[arg-type]
    assert config.mode == mode
    several = 1 if config.max_answers() == 1 else 3
    prompts = [[1, 40, 50, 60], [1, 41]]
    found = generate_ids(
        model, prompts, stop_token_ids=[2], pad_token_id=0, config=config, num_return_sequences=several
    )
    assert [len(answers) for answers in found] == [several, several]
    assert all(0 < len(answer.token_ids) <= 5 or answer.stopped for answers in found for answer in answers)


def test_more_answers_than_a_mode_can_return_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="must be at most 1 with greedy decoding"):
        generate_ids(
            model, [[1]], stop_token_ids=[2], pad_token_id=0, config=GenerationConfig(), num_return_sequences=2
        )


def test_defaults_of_the_checkpoint_are_not_used_and_do_not_change(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = answers(model, tokenizer, PROMPTS)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    assert answers(model, tokenizer, PROMPTS) == before
    assert model.generation_config.repetition_penalty == 5.0


def test_a_mixture_of_experts_generates_without_its_routers_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    config = AutoConfig.for_model(
        "mixtral", vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, output_router_logits=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert len(answers(model, tokenizer, ["Count: 1,", "Name a colour."])) == 2
    assert model.config.output_router_logits
