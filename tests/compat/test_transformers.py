from __future__ import annotations

from typing import Any

import pytest
import torch
from jinja2 import TemplateSyntaxError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FalconForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations.bitsandbytes import Bnb4bitQuantize

from sft_lightning.compat import transformers as compat

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **changes}))
    return model


def test_a_chat_template_is_compiled_as_apply_chat_template_compiles_it(tokenizer: PreTrainedTokenizerFast) -> None:
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content | tojson }}{% endfor %}{% generation %}{% endgeneration %}"
    )
    messages = [{"role": "user", "content": "<é>"}]
    rendered = compat.compile_chat_template(source).render(messages=messages)
    assert rendered == tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)


def test_a_wrong_chat_template_raises_jinjas_error_with_its_line() -> None:
    with pytest.raises(TemplateSyntaxError) as error:
        compat.compile_chat_template("\n{% for %}")
    assert error.value.lineno == 2


def test_the_attention_of_a_configuration_can_be_read_and_set() -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    assert compat.attention_of(model.config) == "eager"
    compat.set_attention(model.config, "packed")
    assert compat.attention_of(model.config) == "packed"


def test_llama_calls_registered_attention_and_bloom_does_not() -> None:
    assert compat.calls_registered_attention(tiny("llama"))
    assert not compat.calls_registered_attention(tiny("bloom", n_head=2, n_layer=1))


def test_mixtral_is_stored_otherwise_than_it_computes_and_llama_is_not() -> None:
    assert compat.stores_other_tensors("mixtral")
    assert not compat.stores_other_tensors("llama")


def test_a_family_whose_files_have_other_names_has_renamings() -> None:
    renamings = compat.tensor_renamings(tiny("gpt_neox"))
    name = "embed_out.weight"
    for renaming in renamings:
        name = renaming(name)
    assert isinstance(name, str)
    assert all(renaming("no.such.weight") == "no.such.weight" for renaming in compat.tensor_renamings(tiny("llama")))


def test_a_module_outside_a_model_is_initialized_as_its_own_modules_are() -> None:
    layer = torch.nn.Linear(64, 64)
    compat.initialize_module(tiny("llama", initializer_range=0.1), layer)
    assert layer.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert not layer.bias.any()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantizer_replaces_the_layers_of_a_model_on_the_meta_device(bits: int) -> None:
    with torch.device("meta"):
        model: Any = tiny("llama")
    quantizer = compat.quantizer_of(BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8))
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    assert type(model.model.layers[0].mlp.up_proj).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    assert type(model.lm_head) is torch.nn.Linear


def test_falcon_is_built_of_plain_layers_inside_the_patch_only() -> None:
    def kinds() -> set[str]:
        model = tiny("falcon")
        assert isinstance(model, FalconForCausalLM)
        return {type(each).__name__ for each in model.transformer.modules() if isinstance(each, torch.nn.Linear)}

    with compat.plain_falcon_layers():
        assert kinds() == {"Linear"}
    assert kinds() == {"FalconLinear"}


def test_a_4_bit_weight_is_quantized_on_the_device_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = Bnb4bitQuantize(hf_quantizer=None)
    seen: list[torch.device] = []

    def convert(self: Any, weights: dict[str, Any], **rest: Any) -> dict[str, torch.Tensor]:
        seen.extend(weight.device for weight in weights.values())
        return {name: torch.zeros(1) for name in weights}

    monkeypatch.setattr(Bnb4bitQuantize, "convert", convert)
    with compat.quantizing_on(torch.device("meta")):
        found = operation.convert({"weight": [torch.ones(2)]})
    assert [device.type for device in seen] == ["meta"]
    assert found["weight"].device.type == "cpu"
    assert Bnb4bitQuantize.convert is convert  # the patch is gone


@pytest.mark.filterwarnings("error::FutureWarning")
def test_every_nth_layer_is_recomputed_and_none_afterwards() -> None:
    model: Any = tiny("llama", num_hidden_layers=5)
    compat.recompute_activations(model, 2)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False, True, False, True]
    compat.keep_activations(model)
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


def test_a_mixture_has_a_balancing_loss_and_a_class_derived_from_it_too() -> None:
    model = tiny("mixtral", num_local_experts=2)
    found = compat.balancing_loss_of(model)
    assert found is not None
    model.__class__ = type("Derived", (type(model),), {})
    assert compat.balancing_loss_of(model) is found
    assert compat.balancing_loss_of(tiny("llama")) is None


def test_an_untied_head_is_saved_and_loaded_as_a_matrix_of_its_own(tmp_path: Any) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    compat.untie_head(model)
    head: Any = model.get_output_embeddings()
    head.weight.data.zero_()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not loaded.get_output_embeddings().weight.any()
    assert loaded.get_input_embeddings().weight.any()
