from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import causal_mask_function, eager_mask

from sft_lightning.models.attention.document_mask import (
    DOCUMENT_MASK,
    choose_attention,
    document_mask,
    use_document_mask,
)
from sft_lightning.models.attention.isolation import measure_isolation
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.training.forward import inputs_of_rows

INPUTS = inputs_of_rows(torch.device("cpu"))
OWN = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "falcon, alibi": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True, "multi_query": False,
        "parallel_attn": False,
    },
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4,
        "max_position_embeddings": 128, "window_size": 8,
    },
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split(",")[0], vocab_size=50, bos_token_id=1, eos_token_id=2, **OWN[name])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    return model.eval()


@pytest.mark.parametrize("name", OWN)
def test_documents_do_not_see_each_other_in_families_with_their_own_attention(name: str) -> None:
    model = build(name)
    assert not measure_isolation(model, 50, INPUTS).verified or name == "gpt_neo"  # which sees the positions
    assert use_document_mask(model)
    assert measure_isolation(model, 50, INPUTS, max_length=100).verified


@pytest.mark.parametrize("name", OWN)
def test_documents_do_not_see_each_other_under_an_adapter(name: str) -> None:
    model: PeftModel = get_peft_model(build(name), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert use_document_mask(model)
    assert measure_isolation(model, 50, INPUTS).verified


@pytest.mark.parametrize("name", OWN)
def test_without_document_lengths_logits_do_not_change_and_are_causal(name: str) -> None:
    model, ids = build(name), torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
        use_document_mask(model)
        model(ids, document_lengths=[[4, 8], [12]])  # leaves nothing behind
        torch.testing.assert_close(model(ids).logits, expected)
        other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 50], 1)
        torch.testing.assert_close(model(other).logits[:, :-1], expected[:, :-1])


@pytest.mark.parametrize("name", OWN)
def test_an_error_in_the_model_clears_the_document_lengths(name: str) -> None:
    model, ids = build(name), torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(1))
    use_document_mask(model)
    with torch.no_grad():
        expected = model(ids).logits
        with pytest.raises(IndexError):
            model(ids + 1000, document_lengths=[[4, 8]])
        torch.testing.assert_close(model(ids).logits, expected)


def test_a_family_that_uses_registered_attention_is_not_changed(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation=PACKED)
    assert not use_document_mask(model)
    assert model.config._attn_implementation == PACKED


def test_the_mask_is_causal_within_documents() -> None:
    mask = document_mask(1, 4, 4, mask_function=causal_mask_function)
    assert torch.equal(mask, eager_mask(batch_size=1, q_length=4, kv_length=4, mask_function=causal_mask_function))
    assert mask.shape == (1, 1, 4, 4)


@pytest.mark.parametrize(("family", "chosen"), [("llama", PACKED), ("opt", PACKED), ("bloom", "eager")])
def test_auto_is_eager_only_for_families_with_their_own_attention(family: str, chosen: str) -> None:
    assert choose_attention("auto", AutoConfig.for_model(family)) == chosen
    assert choose_attention("sdpa", AutoConfig.for_model(family)) == "sdpa"


def test_the_users_choice_of_attention_is_not_replaced() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("falcon", vocab_size=50, **OWN["falcon"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    assert not use_document_mask(model)
    assert model.config._attn_implementation not in (DOCUMENT_MASK, PACKED)
