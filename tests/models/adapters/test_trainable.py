from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.trainable import train_only, trainable_base_names
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.loading import load_model

Make = Callable[..., Any]
"""A helper of conftest.py."""


def trainable_sizes(model: torch.nn.Module) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def test_the_base_trains_too_except_for_adapted_weights(adapted: Make) -> None:
    names = trainable_sizes(adapted(r=2, target_modules=["q_proj"], only_adapter=False))
    assert any("embed_tokens" in name for name in names)
    assert any("k_proj.weight" in name for name in names)
    assert not any("base_layer.weight" in name for name in names)


def test_trainable_base_names_leave_out_the_adapters(adapted: Make, model_dir: Path) -> None:
    model = adapted(r=2, modules_to_save=["lm_head"], only_adapter=False)
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
    with pytest.raises(UserError, match=r"o_proj.*quantized|PEFT rejects"):
        add_adapter(base, AdapterConfig(target_modules=["q_proj"], modules_to_save=["o_proj"]))


IDS = torch.arange(3, 43)[None]


def names_changed_by_one_step(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that a step with weight decay changes."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize(
    ("patterns", "meant"),
    [
        (["lm_head"], {"lm_head.weight"}),
        (
            ["norm"],
            {"model.norm.weight"}
            | {f"model.layers.{i}.{name}_layernorm.weight" for i in (0, 1) for name in ("input", "post_attention")},
        ),
        (
            [r"layers\.1\.self_attn\.[qk]", "embed"],
            {"model.embed_tokens.weight", *(f"model.layers.1.self_attn.{name}_proj.weight" for name in "qk")},
        ),
        ([r"^model\.norm", r"^model\.norm\.weight$"], {"model.norm.weight"}),
    ],
)
def test_only_parameters_that_match_a_pattern_learn(patterns: list[str], meant: set[str], model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    train_only(model, patterns)
    assert names_changed_by_one_step(model) == meant
    assert all((p.grad is not None) == (name in meant) for name, p in model.named_parameters())


def test_layers_below_the_lowest_trainable_one_keep_no_activations(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    train_only(model, [r"layers\.1\.mlp"])
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    model(input_ids=IDS)
    assert seen == [False, True]


def test_tied_embeddings_train_under_their_name() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **shape))
    train_only(model, ["embed_tokens"])
    assert names_changed_by_one_step(model) == {"model.embed_tokens.weight"}
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ([r"lm_hed"], r"model\.trainable: 'lm_hed' matches no parameter's name.*layers\.N\.mlp"),
        (["lm_head", "nothing"], "'nothing' matches no"),
        (["("], "is not a valid regular expression"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_the_names(
    patterns: list[str], said: str, model_dir: Path
) -> None:
    with pytest.raises(UserError, match=said):
        train_only(AutoModelForCausalLM.from_pretrained(model_dir), patterns)
