from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from sft_lightning.compat import peft as compat


def adapted(**changes: Any) -> PeftModel:
    """A Llama of one layer under LoRA on its query, with whatever else is asked for."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    values: dict[str, Any] = {"target_modules": ["q_proj"], "r": 2, "init_lora_weights": False, **changes}
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(task_type="CAUSAL_LM", **values))
    assert isinstance(model, PeftModel)
    return model


def the_base(model: PeftModel) -> Any:
    return model.get_base_model()


def query(model: PeftModel) -> Any:
    return the_base(model).model.layers[0].self_attn.q_proj


def test_the_bases_module_is_found_under_a_layer_and_under_a_wrapper() -> None:
    model = adapted(modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    base = the_base(model)
    assert compat.module_under_adapter(query(model)) is query(model).get_base_layer()
    assert compat.module_under_adapter(base.lm_head) is base.lm_head.original_module
    assert isinstance(compat.module_under_adapter(base.model.embed_tokens), nn.Embedding)
    assert compat.module_under_adapter(base.model.norm) is None


def test_a_module_saved_in_full_is_the_copy_that_runs() -> None:
    model = adapted(modules_to_save=["lm_head"])
    head = the_base(model).lm_head
    saved = compat.module_saved_in_full(head)
    assert saved is compat.module_saved_in_full(head, "default")
    assert isinstance(saved, nn.Linear)
    assert saved is not head.original_module
    saved.weight.data.zero_()
    assert not model(input_ids=torch.ones(1, 2, dtype=torch.long)).logits.any()
    assert compat.module_saved_in_full(query(model)) is None
    assert compat.module_saved_in_full(None) is None


def test_trainable_rows_are_in_a_layer_that_merges_like_others() -> None:
    base = the_base(adapted(trainable_token_indices=[1, 2]))
    rows: Any = compat.token_adapter_of(base.model.embed_tokens)
    rows.trainable_tokens_delta["default"].data.fill_(7)
    weight = torch.zeros(32, 16)
    merged = compat.merge_into_weight(rows, "default", "weight", weight)
    assert torch.equal(merged.sum(1).nonzero().flatten(), torch.tensor([1, 2]))
    assert compat.token_adapter_of(base.lm_head) is None


def test_an_adapter_on_a_parameter_is_told_from_one_on_a_module() -> None:
    model = adapted(target_modules=["v_proj"], target_parameters=["q_proj.weight"])
    wrapped = [module for module in model.modules() if compat.adapts_parameter(module)]
    assert len(wrapped) == 1
    assert not compat.adapts_parameter(the_base(model).model.layers[0].self_attn.v_proj)


def test_a_weight_is_merged_by_the_layers_own_arithmetic_and_the_layer_stays() -> None:
    layer = query(adapted())
    own = layer.get_base_layer().weight.detach().clone()
    weight = torch.randn_like(own)
    merged = compat.merge_into_weight(layer, "default", "weight", weight)
    torch.testing.assert_close(merged, weight + layer.get_delta_weight("default"))
    assert torch.equal(layer.get_base_layer().weight, own)
    assert not layer.merged
    again = compat.merge_into_weight(layer, "default", "weight", weight)  # it does not refuse a second time
    assert torch.equal(again, merged)


@pytest.mark.parametrize("lora_bias", [True, False])
def test_lora_changes_a_bias_only_where_it_has_one_of_its_own(lora_bias: bool) -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], r=2, lora_bias=lora_bias)
    )
    assert compat.changes_bias(model.base_model.model[0], "default") is lora_bias


def test_other_methods_may_change_a_bias() -> None:
    model: Any = get_peft_model(nn.Sequential(nn.Linear(4, 4)), IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert compat.changes_bias(model.base_model.model[0], "default")


def test_name_parts_tell_an_adapters_parameters_from_the_bases() -> None:
    model = adapted(modules_to_save=["lm_head"], trainable_token_indices=[1])
    parts = compat.adapter_name_parts(model)
    own = {name for name, p in model.named_parameters() if any(part in name for part in parts)}
    assert own == {name for name, p in model.named_parameters() if p.requires_grad}


def test_what_an_adapter_stands_for_is_told_by_its_name() -> None:
    model = adapted(modules_to_save=["lm_head"])
    replaced = {name for name, _ in model.named_parameters() if compat.is_replaced_by_adapter(name)}
    assert replaced == {
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "base_model.model.lm_head.original_module.weight",
    }


def test_dora_reads_the_bases_weight_and_both_low_rank_ones() -> None:
    layer = query(adapted(use_dora=True))
    read = {id(weight) for _, weight in compat.weights_read_by_dora(layer)}
    assert read == {
        id(each.weight) for each in (layer.get_base_layer(), *layer.lora_A.values(), *layer.lora_B.values())
    }
    assert list(compat.weights_read_by_dora(query(adapted()))) == []


def test_dora_on_an_embedding_reads_its_low_rank_parameters() -> None:
    embedding = the_base(adapted(target_modules=["embed_tokens"], use_dora=True)).model.embed_tokens
    [*found] = compat.weights_read_by_dora(embedding)
    assert {id(weight) for _, weight in found} == {
        id(weight)
        for weight in (
            embedding.get_base_layer().weight,
            embedding.lora_embedding_A["default"],
            embedding.lora_embedding_B["default"],
        )
    }
    assert {id(dora) for dora, _ in found} == {id(embedding.lora_magnitude_vector["default"])}
