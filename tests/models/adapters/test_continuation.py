from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.continuation import describe_overrides
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.export.write import export_adapter

Make = Callable[..., Any]
"""A helper of conftest.py."""


def trainable_sizes(model: torch.nn.Module) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


IDS = torch.arange(12)[None]


def test_an_adapter_is_continued_with_its_own_configuration(adapted: Make, model_dir: Path, tmp_path: Path) -> None:
    adapted(r=2).save_pretrained(str(tmp_path), save_embedding_layers=False)
    config = AdapterConfig(r=16, alpha=8, path=str(tmp_path))
    continued = add_adapter(AutoModelForCausalLM.from_pretrained(model_dir), config)
    assert continued.peft_config["default"].r == 2
    assert trainable_sizes(continued)
    lines = describe_overrides(continued, config)
    assert [line.split(":")[0] for line in lines] == ["model.adapter.r", "model.adapter.alpha"]
    assert "2 from the adapter in" in lines[0]
    assert "16" in lines[0]


def test_a_new_adapter_overrides_nothing(adapted: Make) -> None:
    assert describe_overrides(adapted(r=2), AdapterConfig(r=2)) == []


def perturbed(model: PeftModel) -> PeftModel:
    """Move everything that trains."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def test_dropped_modules_to_save_keep_their_values_frozen_through_exports(
    adapted: Make, tokenizer: PreTrainedTokenizerFast, model_dir: Path, tmp_path: Path
) -> None:
    first = perturbed(adapted(r=2, modules_to_save=["embed_tokens", "lm_head"]))
    first.save_pretrained(str(tmp_path / "first"), save_embedding_layers=False)
    config = AdapterConfig(path=str(tmp_path / "first"), drop_modules_to_save=True)
    continued = add_adapter(AutoModelForCausalLM.from_pretrained(model_dir), config)
    assert all(".lora_" in name for name in trainable_sizes(continued))
    torch.testing.assert_close(logits(continued), logits(first), atol=1e-6, rtol=0)
    assert any("2 weights of the base" in line for line in describe_overrides(continued, config))

    perturbed(continued)
    report = export_adapter(continued, tokenizer, tmp_path / "second", {}, stop_token_id=2)
    assert len(report.base_weights) == 2
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), str(tmp_path / "second"))
    torch.testing.assert_close(logits(plain), logits(continued), atol=1e-6, rtol=0)
    again = adapted(path=str(tmp_path / "second"))
    assert torch.equal(logits(again), logits(continued))
    assert trainable_sizes(again) == trainable_sizes(continued)


def tied(model_dir: Path) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def test_dropped_tied_embeddings_keep_their_values(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first = perturbed(add_adapter(tied(model_dir), AdapterConfig(r=2, modules_to_save=["embed_tokens", "lm_head"])))
    first.save_pretrained(str(tmp_path / "first"), save_embedding_layers=False)
    continued = add_adapter(tied(model_dir), AdapterConfig(path=str(tmp_path / "first"), drop_modules_to_save=True))
    torch.testing.assert_close(logits(continued), logits(first), atol=1e-6, rtol=0)
    export_adapter(continued, tokenizer, tmp_path / "second", {}, stop_token_id=2)
    again = add_adapter(tied(model_dir), AdapterConfig(path=str(tmp_path / "second")))
    assert torch.equal(logits(again), logits(continued))


def test_dropping_one_of_two_tied_embeddings_is_refused(model_dir: Path, tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    get_peft_model(tied(model_dir), config).save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(UserError, match=r"model\.adapter\.path: .* trained one of two tied embeddings"):
        add_adapter(tied(model_dir), AdapterConfig(path=str(tmp_path), drop_modules_to_save=True))


@pytest.fixture
def train_with_base(adapted: Make, tokenizer: PreTrainedTokenizerFast) -> Make:
    """Export an adapter that trained together with its base (`only_adapter: false`)."""

    def train(folder: Path, **config: Any) -> PeftModel:
        model: PeftModel = adapted(r=2, only_adapter=False, **config)
        perturbed(model)
        export_adapter(model, tokenizer, folder, {}, stop_token_id=2)
        return model

    return train


def test_an_adapter_that_trained_with_its_base_is_continued_with_it(
    adapted: Make, train_with_base: Make, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first = train_with_base(tmp_path / "first")
    continued = adapted(path=str(tmp_path / "first"), only_adapter=False).eval()
    assert trainable_sizes(continued) == trainable_sizes(first)
    with torch.no_grad():
        assert torch.equal(continued(input_ids=IDS).logits, first(input_ids=IDS).logits)
    continued(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD([p for p in continued.parameters() if p.requires_grad], lr=0.1).step()
    report = export_adapter(continued, tokenizer, tmp_path / "second", {}, stop_token_id=2)
    assert "base_model.model.model.norm.weight" in report.base_weights
    again = adapted(path=str(tmp_path / "second"), only_adapter=False).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, continued(input_ids=IDS).logits)


def test_continuing_only_the_adapter_keeps_the_weights_of_the_base_that_trained_with_it(
    adapted: Make, train_with_base: Make, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first = train_with_base(tmp_path / "first")
    continued = adapted(path=str(tmp_path / "first"))
    assert all(".lora_" in name for name in trainable_sizes(continued))
    assert torch.equal(logits(continued), logits(first))
    report = export_adapter(perturbed(continued), tokenizer, tmp_path / "second", {}, stop_token_id=2)
    assert "base_model.model.model.norm.weight" in report.base_weights


def test_modules_to_save_can_be_dropped_when_the_base_is_continued(
    adapted: Make, train_with_base: Make, tmp_path: Path
) -> None:
    first = train_with_base(tmp_path, modules_to_save=["lm_head"])
    continued = adapted(path=str(tmp_path), only_adapter=False, drop_modules_to_save=True)
    weights, trained = dict(continued.named_parameters()), dict(first.named_parameters())
    head = trained["base_model.model.lm_head.modules_to_save.default.weight"]
    assert torch.equal(weights["base_model.model.lm_head.weight"], head)
    norm = "base_model.model.model.norm.weight"
    assert torch.equal(weights[norm], trained[norm])


def test_an_adapter_alone_is_continued_with_its_base(adapted: Make, tmp_path: Path) -> None:
    adapted(r=2).save_pretrained(str(tmp_path), save_embedding_layers=False)
    names = trainable_sizes(adapted(path=str(tmp_path), only_adapter=False))
    assert any(name.endswith("norm.weight") for name in names)


def test_keys_that_the_continued_method_does_not_have_are_reported_if_they_were_set(
    adapted: Make, model_dir: Path, tmp_path: Path
) -> None:
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    adapted(peft_config=ia3).save_pretrained(str(tmp_path))
    config = AdapterConfig(path=str(tmp_path), use_dora=True, r=4)
    lines = describe_overrides(add_adapter(AutoModelForCausalLM.from_pretrained(model_dir), config), config)
    assert lines == [
        f"model.adapter.r: 4 is ignored; the IA3 adapter in {tmp_path} has no r",
        f"model.adapter.use_dora: True is ignored; the IA3 adapter in {tmp_path} has no use_dora",
    ]


def test_dropping_modules_that_the_adapter_does_not_have_is_refused(adapted: Make, tmp_path: Path) -> None:
    adapted(r=2).save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(UserError, match="has no modules_to_save"):
        adapted(path=str(tmp_path), drop_modules_to_save=True)
