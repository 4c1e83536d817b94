from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

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


def test_modules_to_save_can_be_dropped_on_continuing(adapted: Make, tmp_path: Path) -> None:
    first = adapted(r=2, modules_to_save=["lm_head"])
    first.save_pretrained(str(tmp_path), save_embedding_layers=False)
    continued = adapted(path=str(tmp_path), drop_modules_to_save=True)
    assert not any("lm_head" in name for name in trainable_sizes(continued))
    kept = {name: p for name, p in first.named_parameters() if "lora_" in name}
    found = dict(continued.named_parameters())
    assert all(torch.equal(found[name], p) for name, p in kept.items())


@pytest.fixture
def train_with_base(adapted: Make, tokenizer: PreTrainedTokenizerFast) -> Make:
    """Export an adapter that trained together with its base (`only_adapter: false`)."""

    def train(folder: Path, **config: Any) -> PeftModel:
        model: PeftModel = adapted(r=2, only_adapter=False, **config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        export_adapter(model, tokenizer, folder, {}, stop_token_id=2)
        return model.eval()

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


def test_continuing_only_the_adapter_is_refused_if_weights_of_the_base_would_be_lost(
    adapted: Make, train_with_base: Make, tmp_path: Path
) -> None:
    train_with_base(tmp_path)
    with pytest.raises(UserError, match=r"only_adapter: must be false, .* 7 weights of its base .* or merge"):
        adapted(path=str(tmp_path))


def test_modules_to_save_can_be_dropped_when_the_base_is_continued(
    adapted: Make, train_with_base: Make, model_dir: Path, tmp_path: Path
) -> None:
    first = train_with_base(tmp_path, modules_to_save=["lm_head"])
    continued = adapted(path=str(tmp_path), only_adapter=False, drop_modules_to_save=True)
    base, weights = AutoModelForCausalLM.from_pretrained(model_dir), dict(continued.named_parameters())
    assert torch.equal(weights["base_model.model.lm_head.weight"], base.lm_head.weight)
    norm = "base_model.model.model.norm.weight"
    assert torch.equal(weights[norm], dict(first.named_parameters())[norm])


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
