from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.trainable import train_only

IDS = torch.arange(3, 43)[None]


def one_step(model: PreTrainedModel) -> set[str]:
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
def test_only_what_a_pattern_names_learns(patterns: list[str], meant: set[str], model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    train_only(model, patterns)
    assert one_step(model) == meant
    assert all((p.grad is not None) == (name in meant) for name, p in model.named_parameters())


def test_layers_below_the_lowest_that_trains_keep_no_activations(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    train_only(model, [r"layers\.1\.mlp"])
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    model(input_ids=IDS)
    assert seen == [False, True]


def test_tied_embeddings_train_under_the_name_that_they_have() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **shape))
    train_only(model, ["embed_tokens"])
    assert one_step(model) == {"model.embed_tokens.weight"}
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ([r"lm_hed"], r"model\.trainable: 'lm_hed' is found in no parameter's name.*layers\.N\.mlp"),
        (["lm_head", "nothing"], "'nothing' is found in no"),
        (["("], "is no regular expression"),
    ],
)
def test_naming_what_does_not_exist_lists_what_does(patterns: list[str], said: str, model_dir: Path) -> None:
    with pytest.raises(UserError, match=said):
        train_only(AutoModelForCausalLM.from_pretrained(model_dir), patterns)
