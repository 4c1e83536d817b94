from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.generation.text_continuation import TextContinuation

SHORT, LONG = [5, 6, 7], [8, 9, 10, 11, 12]


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=32, **sizes, num_attention_heads=2, num_key_value_heads=2)
    built: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return built


def start(model: PreTrainedModel, **options: bool) -> TextContinuation:
    padding = [0] * (len(LONG) - len(SHORT))
    ids, mask = [padding + SHORT, LONG], [padding + [1] * len(SHORT), [1] * len(LONG)]
    return TextContinuation(model, torch.tensor(ids), torch.tensor(mask), **options)


@torch.no_grad()
def next_logits(model: PreTrainedModel, text: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([text])).logits[0, -1]
    return logits


@torch.no_grad()
def test_padded_texts_have_the_logits_of_each_alone(model: PreTrainedModel) -> None:
    texts = start(model)
    torch.testing.assert_close(texts.logits[0], next_logits(model, SHORT))
    torch.testing.assert_close(texts.logits[1], next_logits(model, LONG))


@torch.no_grad()
def test_fed_tokens_are_appended_to_each_text(model: PreTrainedModel) -> None:
    texts = start(model)
    for tokens in ([1, 2], [3, 4]):
        texts.feed(torch.tensor(tokens))
    torch.testing.assert_close(texts.logits[0], next_logits(model, [*SHORT, 1, 3]))
    torch.testing.assert_close(texts.logits[1], next_logits(model, [*LONG, 2, 4]))


@torch.no_grad()
def test_rows_can_be_reordered_and_repeated(model: PreTrainedModel) -> None:
    texts = start(model)
    texts.select(torch.tensor([1, 0, 1]))
    texts.feed(torch.tensor([1, 2, 3]))
    expected = [next_logits(model, text) for text in ([*LONG, 1], [*SHORT, 2], [*LONG, 3])]
    torch.testing.assert_close(texts.logits, torch.stack(expected))


@torch.no_grad()
def test_hidden_states_are_those_of_the_tokens_fed_last(model: PreTrainedModel) -> None:
    texts = start(model, hidden=True)
    assert texts.hidden.shape == (2, len(LONG), 16)
    texts.feed(torch.tensor([1, 2]))
    assert texts.hidden.shape == (2, 1, 16)


@torch.no_grad()
def test_an_adapter_is_part_of_the_model(model: PreTrainedModel) -> None:
    plain = start(model).logits
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()  # type: ignore[arg-type]
    assert float((start(adapted).logits - plain).abs().max()) > 1e-6  # type: ignore[arg-type]


def test_a_model_without_a_cache_that_can_be_reordered_is_refused() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 2}
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=32, **sizes)).eval()
    with pytest.raises(UserError, match=r"require a key-value cache .* MambaForCausalLM does not have"):
        start(mamba)
