from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter, peft_config_of

Make = Callable[..., Any]
"""A helper of conftest.py."""


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    values = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**values, **changes}))


def trainable_sizes(model: torch.nn.Module) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def test_all_linear_adapts_every_linear_layer_but_the_head(adapted: Make) -> None:
    names = trainable_sizes(adapted(r=2))
    assert len(names) == 2 * 7 * 2
    assert not any("lm_head" in name for name in names)


def test_an_adapter_has_r_times_inputs_plus_outputs_weights(adapted: Make) -> None:
    sizes = trainable_sizes(adapted(r=2, target_modules=["q_proj", "v_proj"]))
    assert sum(sizes.values()) == 2 * (2 * (32 + 32) + 2 * (32 + 16))


def test_modules_to_save_train_in_full(adapted: Make) -> None:
    names = trainable_sizes(adapted(modules_to_save=["lm_head"]))
    assert any("lm_head.modules_to_save" in name for name in names)


def test_adapter_weights_are_float32_on_a_bfloat16_base(model_dir: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    model = add_adapter(base, AdapterConfig(r=2))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target_modules": ["q_proj", "queries"]}, "'queries' matches no module"),
        ({"target_modules": "nothing.*"}, r"matches no whole module name.*down_proj.*presets: all-linear"),
        ({"target_modules": "all_linear"}, "Did you mean 'all-linear'"),
        ({"target_modules": "q_proj("}, "is not a valid regular expression"),
        ({"target_modules": "mamba"}, "'mamba' matches no module of this llama model"),
        ({"target_modules": ".*norm"}, "PEFT rejects LoraConfig"),
        ({"modules_to_save": ["lm_haed"]}, "Did you mean 'lm_head'"),
        ({"peft_config": IA3Config(target_modules=["kproj"])}, r"peft_config\.init_args\.target_modules: 'kproj'"),
        ({"init": "loftq"}, "model.quantization|CUDA device"),
        ({"path": "nowhere"}, r"model\.adapter\.path: PEFT cannot read the configuration of 'nowhere'"),
    ],
)
def test_a_setting_that_does_not_fit_the_model_is_named_with_what_exists(
    adapted: Make, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        adapted(**config)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_mamba_answers_like_the_adapted_one(tied: bool) -> None:
    base = tiny_model("mamba", tie_word_embeddings=tied)
    model = add_adapter(base, AdapterConfig(r=2, target_modules="mamba", dropout=0.0)).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
        adapted_logits = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    assert float((adapted_logits - plain).abs().max()) > 1e-4
    assert torch.allclose(merged, adapted_logits, atol=1e-5)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_every_bias_mode_trains_saves_and_loads_its_biases(bias: Any, tmp_path: Path) -> None:
    def base() -> PreTrainedModel:
        return tiny_model("gpt2", n_inner=32)

    model = add_adapter(base(), AdapterConfig(r=2, target_modules="attention", bias=bias))
    biases = [name for name in trainable_sizes(model) if "bias" in name]
    assert bool(biases) is (bias != "none")
    assert any("ln_1" in name for name in biases) is (bias == "all")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    ids = torch.arange(12)[None]
    expected = model.eval()(input_ids=ids).logits
    for loaded in (PeftModel.from_pretrained(base(), tmp_path), add_adapter(base(), AdapterConfig(path=str(tmp_path)))):
        assert torch.equal(loaded.eval()(input_ids=ids).logits, expected)


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_stay_tied_when_they_train(names: list[str], tmp_path: Path) -> None:
    def base() -> PreTrainedModel:
        return tiny_model("llama", intermediate_size=32, tie_word_embeddings=True)

    model = add_adapter(base(), AdapterConfig(r=2, modules_to_save=names))
    embedding, head = (
        m() for m in (model.get_base_model().get_input_embeddings, model.get_base_model().get_output_embeddings)
    )
    assert embedding.weight is head.weight
    with torch.no_grad():
        embedding.weight.add_(0.5)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    ids = torch.arange(12)[None]
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_the_keys_are_pefts_under_the_fields_names() -> None:
    config: Any = peft_config_of(AdapterConfig(r=4, alpha=8, dropout=0.1, bias="all", use_rslora=True, init="gaussian"))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 8, 0.1, "all")
    assert (config.use_rslora, config.use_dora, config.init_lora_weights) == (True, False, "gaussian")
    assert config.task_type == "CAUSAL_LM"
    assert config.target_modules == set()  # the preset is resolved on the model


@pytest.mark.parametrize(("init", "theirs"), [("default", True), ("loftq", True), ("olora", "olora")])
def test_initial_weights_that_peft_does_not_know_start_at_its_default(init: str, theirs: bool | str) -> None:
    assert peft_config_of(AdapterConfig(init=init)).init_lora_weights == theirs  # type: ignore[attr-defined]


def test_another_method_is_a_copy_that_peft_may_change() -> None:
    given = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    found = peft_config_of(AdapterConfig(peft_config=given))
    assert found is not given
    assert (found.task_type, given.task_type) == ("CAUSAL_LM", None)
