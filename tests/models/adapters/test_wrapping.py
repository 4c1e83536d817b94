from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.continuation import describe_overrides
from sft_lightning.models.adapters.targets import resolve_preset
from sft_lightning.models.adapters.trainable import trainable_base_names
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.loading import load_model
from sft_lightning.models.export.write import export_adapter


def adapted(model_dir: Path, **config: Any) -> PeftModel:
    return add_adapter(AutoModelForCausalLM.from_pretrained(model_dir), AdapterConfig(**config))


def trainable(model: torch.nn.Module) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def test_all_linear_adapts_every_linear_layer_but_the_head(model_dir: Path) -> None:
    names = trainable(adapted(model_dir, r=2))
    assert len(names) == 2 * 7 * 2
    assert not any("lm_head" in name for name in names)


def test_the_number_of_weights_is_that_of_the_formula(model_dir: Path) -> None:
    sizes = trainable(adapted(model_dir, r=2, target_modules=["q_proj", "v_proj"]))
    assert sum(sizes.values()) == 2 * (2 * (32 + 32) + 2 * (32 + 16))


def test_modules_to_save_train_in_full(model_dir: Path) -> None:
    names = trainable(adapted(model_dir, modules_to_save=["lm_head"]))
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
        ({"target_modules": "q_proj("}, "is no regular expression"),
        ({"target_modules": "mamba"}, "'mamba' matches no module of this llama model"),
        ({"target_modules": ".*norm"}, "PEFT refuses LoraConfig"),
        ({"modules_to_save": ["lm_haed"]}, "Did you mean 'lm_head'"),
        ({"peft_config": IA3Config(target_modules=["kproj"])}, r"peft_config\.init_args\.target_modules: 'kproj'"),
        ({"init": "loftq"}, "model.quantization|CUDA device"),
        ({"path": "nowhere"}, r"model\.adapter\.path: PEFT cannot read the configuration of 'nowhere'"),
    ],
)
def test_what_matches_nothing_is_an_error(config: dict[str, Any], said: str, model_dir: Path) -> None:
    with pytest.raises(UserError, match=said):
        adapted(model_dir, **config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 0}, r"model\.adapter\.r:"),
        ({"dropout": 1.0}, r"model\.adapter\.dropout"),
        ({"lora_plus_ratio": 0.0}, r"model\.adapter\.lora_plus_ratio"),
        ({"init": "pisa"}, "Did you mean 'pissa'"),
        ({"init": "eva"}, "measures the model on data"),
        ({"init": "pissa_niter_4"}, "use 'pissa'"),
        ({"base_lr": 1e-4}, "only_adapter: false"),
        ({"base_lr": 0.0, "only_adapter": False}, "must be above 0"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, r"model\.adapter\.layers_to_transform"),
        ({"drop_modules_to_save": True}, r"set model\.adapter\.path"),
        ({"r": 4, "use_dora": True, "peft_config": IA3Config()}, "no place for r, use_dora"),
        ({"path": "x", "peft_config": IA3Config()}, "no place for path"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        AdapterConfig(**config)


def tiny(model_type: str, **changes: Any) -> PreTrainedModel:
    values = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**values, **changes}))


@pytest.mark.parametrize(
    ("preset", "model_type", "expected"),
    [
        ("attention", "llama", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("mlp", "llama", ["down_proj", "gate_proj", "up_proj"]),
        ("attention", "gpt2", ["attn.c_proj", "c_attn"]),
        ("mlp", "gpt2", ["c_fc", "mlp.c_proj"]),
        ("attention", "gpt_neox", ["dense", "query_key_value"]),
        ("mlp", "gpt_neox", ["dense_4h_to_h", "dense_h_to_4h"]),
        ("mlp", "opt", ["fc1", "fc2"]),
        ("attention", "bloom", ["dense", "query_key_value"]),
        ("attention", "falcon", ["dense", "query_key_value"]),
        ("attention", "phi3", ["o_proj", "qkv_proj"]),
        ("mamba", "mamba", ["in_proj"]),
        ("all-linear", "mamba", ["in_proj"]),
    ],
)
def test_a_preset_finds_its_modules_in_every_family(preset: str, model_type: str, expected: list[str]) -> None:
    changes: dict[str, Any] = {"pad_token_id": 0}
    if model_type != "mamba":
        changes |= {"intermediate_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 16, "n_inner": 32}
    model = tiny(model_type, **changes)
    assert sorted(resolve_preset(model, preset)) == sorted(expected)
    assert trainable(add_adapter(model, AdapterConfig(r=2, target_modules=preset)))


def test_embeddings_of_mamba_are_adapted_where_they_are_not_tied() -> None:
    untied = tiny("mamba", tie_word_embeddings=False)
    assert sorted(resolve_preset(untied, "mamba")) == ["embeddings", "in_proj"]


def test_an_adapter_on_tied_embeddings_is_refused() -> None:
    tied = tiny("llama", intermediate_size=32, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"shares its matrix with lm_head.*modules_to_save"):
        add_adapter(tied, AdapterConfig(target_modules=["q_proj", "embed_tokens"]))


@pytest.mark.parametrize("targets", [["out_proj"], ["x_proj", "in_proj"], r".*(in|dt)_proj"])
def test_what_mamba_reads_past_its_module_is_refused(targets: list[str] | str) -> None:
    with pytest.raises(UserError, match="past the module"):
        add_adapter(tiny("mamba"), AdapterConfig(target_modules=targets))


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_mamba_answers_like_the_adapted_one(tied: bool) -> None:
    base = tiny("mamba", tie_word_embeddings=tied)
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
        return tiny("gpt2", n_inner=32)

    model = add_adapter(base(), AdapterConfig(r=2, target_modules="attention", bias=bias))
    biases = [name for name in trainable(model) if "bias" in name]
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


def test_the_base_trains_too_except_what_the_adapter_stands_for(model_dir: Path) -> None:
    names = trainable(adapted(model_dir, r=2, target_modules=["q_proj"], only_adapter=False))
    assert any("embed_tokens" in name for name in names)
    assert any("k_proj.weight" in name for name in names)
    assert not any("base_layer.weight" in name for name in names)


def test_base_names_are_those_that_are_not_the_adapters(model_dir: Path) -> None:
    model = adapted(model_dir, r=2, modules_to_save=["lm_head"], only_adapter=False)
    names = trainable_base_names(model)
    assert any(name.endswith("embed_tokens.weight") for name in names)
    assert not any("lora_" in name or "modules_to_save" in name for name in names)
    assert trainable_base_names(AutoModelForCausalLM.from_pretrained(model_dir)) == set()


def test_modules_to_save_of_a_half_precision_base_have_float32_masters(model_dir: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float16)
    model = add_adapter(base, AdapterConfig(r=2, modules_to_save=["embed_tokens", "lm_head"]))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    out = model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None])
    assert out.logits.dtype == torch.float16
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_quantized_module_cannot_be_trained_in_full(model_dir: Path) -> None:
    base = load_model(
        str(model_dir), from_config=None, dtype="float32", attn_implementation="sdpa",
        quantization=QuantizationConfig(), vocab_size=320,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"o_proj.*quantized|PEFT refuses"):
        add_adapter(base, AdapterConfig(target_modules=["q_proj"], modules_to_save=["o_proj"]))


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_stay_tied_when_they_train(names: list[str], tmp_path: Path) -> None:
    def base() -> PreTrainedModel:
        return tiny("llama", intermediate_size=32, tie_word_embeddings=True)

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


def test_an_adapter_is_continued_with_its_own_configuration(model_dir: Path, tmp_path: Path) -> None:
    adapted(model_dir, r=2).save_pretrained(str(tmp_path), save_embedding_layers=False)
    config = AdapterConfig(r=16, alpha=8, path=str(tmp_path))
    continued = add_adapter(AutoModelForCausalLM.from_pretrained(model_dir), config)
    assert continued.peft_config["default"].r == 2
    assert trainable(continued)
    lines = describe_overrides(continued, config)
    assert [line.split(":")[0] for line in lines] == ["model.adapter.r", "model.adapter.alpha"]
    assert "2, as in" in lines[0]
    assert "16" in lines[0]


def test_a_new_adapter_has_no_differences(model_dir: Path) -> None:
    assert describe_overrides(adapted(model_dir, r=2), AdapterConfig(r=2)) == []


def test_modules_to_save_can_be_dropped_on_continuing(model_dir: Path, tmp_path: Path) -> None:
    first = adapted(model_dir, r=2, modules_to_save=["lm_head"])
    first.save_pretrained(str(tmp_path), save_embedding_layers=False)
    continued = adapted(model_dir, path=str(tmp_path), drop_modules_to_save=True)
    assert not any("lm_head" in name for name in trainable(continued))
    kept = {name: p for name, p in first.named_parameters() if "lora_" in name}
    found = dict(continued.named_parameters())
    assert all(torch.equal(found[name], p) for name, p in kept.items())


def trained_with_its_base(
    model_dir: Path, folder: Path, tokenizer: PreTrainedTokenizerFast, **config: Any
) -> PeftModel:
    """An export of `only_adapter: false`, the base's own weights moved."""
    model = adapted(model_dir, r=2, only_adapter=False, **config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    export_adapter(model, tokenizer, folder, {})
    return model.eval()


IDS = torch.arange(12)[None]


def test_an_adapter_that_trained_with_its_base_is_continued_with_it(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first = trained_with_its_base(model_dir, tmp_path / "first", tokenizer)
    continued = adapted(model_dir, path=str(tmp_path / "first"), only_adapter=False).eval()
    assert trainable(continued) == trainable(first)
    with torch.no_grad():
        assert torch.equal(continued(input_ids=IDS).logits, first(input_ids=IDS).logits)
    continued(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD([p for p in continued.parameters() if p.requires_grad], lr=0.1).step()
    report = export_adapter(continued, tokenizer, tmp_path / "second", {})
    assert "base_model.model.model.norm.weight" in report.base_weights
    again = adapted(model_dir, path=str(tmp_path / "second"), only_adapter=False).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, continued(input_ids=IDS).logits)


def test_weights_of_the_base_would_be_lost_where_only_the_adapter_is_continued(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trained_with_its_base(model_dir, tmp_path, tokenizer)
    with pytest.raises(UserError, match=r"model\.adapter\.only_adapter: .* 7 weights of its base .* false, or merge"):
        adapted(model_dir, path=str(tmp_path))


def test_modules_to_save_can_be_dropped_where_the_base_is_continued(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first = trained_with_its_base(model_dir, tmp_path, tokenizer, modules_to_save=["lm_head"])
    continued = adapted(model_dir, path=str(tmp_path), only_adapter=False, drop_modules_to_save=True)
    base, weights = AutoModelForCausalLM.from_pretrained(model_dir), dict(continued.named_parameters())
    assert torch.equal(weights["base_model.model.lm_head.weight"], base.lm_head.weight)
    norm = "base_model.model.model.norm.weight"
    assert torch.equal(weights[norm], dict(first.named_parameters())[norm])


def test_an_adapter_alone_is_continued_with_its_base(model_dir: Path, tmp_path: Path) -> None:
    adapted(model_dir, r=2).save_pretrained(str(tmp_path), save_embedding_layers=False)
    names = trainable(adapted(model_dir, path=str(tmp_path), only_adapter=False))
    assert any(name.endswith("norm.weight") for name in names)


def test_keys_that_another_method_does_not_have_are_reported_where_they_were_set(
    model_dir: Path, tmp_path: Path
) -> None:
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    adapted(model_dir, peft_config=ia3).save_pretrained(str(tmp_path))
    config = AdapterConfig(path=str(tmp_path), use_dora=True, r=4)
    lines = describe_overrides(add_adapter(AutoModelForCausalLM.from_pretrained(model_dir), config), config)
    assert lines == [
        f"model.adapter.r: 4 is not used; the IA3 adapter in {tmp_path} has none",
        f"model.adapter.use_dora: True is not used; the IA3 adapter in {tmp_path} has none",
    ]


def test_dropping_what_is_not_there_is_refused(model_dir: Path, tmp_path: Path) -> None:
    adapted(model_dir, r=2).save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(UserError, match="has no modules_to_save"):
        adapted(model_dir, path=str(tmp_path), drop_modules_to_save=True)


def edited(weights: dict[str, torch.Tensor], change: str) -> dict[str, torch.Tensor]:
    name = sorted(weights)[0]
    if change == "missing":
        return {key: tensor for key, tensor in weights.items() if key != name}
    if change == "unknown":
        return {**weights, name.replace("layers.0", "layers.7"): weights[name].clone()}
    return {**weights, name: torch.zeros(3, 3)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "missing base_model.*, left over none"),
        ("unknown", r"missing none, left over base_model.*layers\.7"),
        ("shape", r"is \(3, 3\), the model wants"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(change: str, said: str, model_dir: Path, tmp_path: Path) -> None:
    adapted(model_dir, r=2).save_pretrained(str(tmp_path), save_embedding_layers=False)
    file = tmp_path / "adapter_model.safetensors"
    save_file(edited(load_file(file), change), file)
    with pytest.raises(UserError, match=rf"model\.adapter\.path: .*{said}"):
        adapted(model_dir, path=str(tmp_path))
