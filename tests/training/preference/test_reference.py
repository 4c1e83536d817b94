from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.training.preference.reference import adapter_off, choose_reference

IA3 = IA3Config(target_modules=["q_proj"], feedforward_modules=[])


def base() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32, **sizes))
    return model


@pytest.mark.parametrize(
    ("adapter", "kind", "reason"),
    [
        (AdapterConfig(r=2), "adapter_off", "starts at zero"),
        (AdapterConfig(r=2, init="gaussian"), "adapter_off", "starts at zero"),
        (AdapterConfig(r=2, init="pissa"), "precomputed", "model.adapter.init: pissa"),
        (AdapterConfig(r=2, only_adapter=False), "precomputed", "weights of the base train too"),
        (
            AdapterConfig(peft_config=IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
            "precomputed",
            "PEFT",
        ),
        (None, "precomputed", "no adapter to switch off"),
    ],
    ids=["default", "gaussian", "pissa", "base trains", "peft_config", "full"],
)
def test_auto_switches_the_adapter_off_only_if_that_is_the_model_before_training(
    adapter: AdapterConfig | None, kind: str, reason: str
) -> None:
    model = base() if adapter is None else add_adapter(base(), adapter)
    choice = choose_reference("auto", model, adapter)
    assert choice.kind == kind
    assert reason in choice.reason


def test_a_continued_adapter_is_part_of_the_model_before_training_unless_the_user_says_otherwise() -> None:
    model = add_adapter(base(), AdapterConfig(r=2))
    continued = AdapterConfig(r=2, path="some/adapter")
    assert choose_reference("auto", model, continued).kind == "precomputed"
    assert choose_reference("adapter_off", model, continued).kind == "adapter_off"


def test_precomputed_is_always_possible() -> None:
    adapter = AdapterConfig(r=2)
    assert choose_reference("precomputed", add_adapter(base(), adapter), adapter).kind == "precomputed"


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [(None, "no adapter to switch off"), (AdapterConfig(r=2, only_adapter=False), "weights of the base train too")],
)
def test_adapter_off_is_refused_if_no_unchanged_model_is_left_without_the_adapter(
    adapter: AdapterConfig | None, reason: str
) -> None:
    model = base() if adapter is None else add_adapter(base(), adapter)
    with pytest.raises(UserError, match=rf"model\.preference\.reference: adapter_off, but .*{reason}.*use precomputed"):
        choose_reference("adapter_off", model, adapter)


def test_with_the_adapter_off_the_model_is_its_base_and_trains_the_same_afterwards() -> None:
    plain = base().eval()
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    adapted: PeftModel = get_peft_model(base(), config).eval()  # type: ignore[assignment]
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.zero_()
    ids = torch.arange(8)[None]
    expected = plain(input_ids=ids).logits
    trains = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    with adapter_off(adapted):
        assert torch.equal(adapted(input_ids=ids).logits, expected)
    assert not torch.equal(adapted(input_ids=ids).logits, expected)
    assert {name for name, parameter in adapted.named_parameters() if parameter.requires_grad} == trains
