from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sft_lightning.models import export
from sft_lightning.models.adapters import AdapterConfig, add_adapter
from sft_lightning.models.export import export_adapter, export_model


@pytest.fixture
def model(model_dir: Path) -> PeftModel:
    """An adapted model that has learned something."""
    adapted = add_adapter(
        AutoModelForCausalLM.from_pretrained(model_dir), AdapterConfig(r=2, modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted.eval()


IDS = torch.arange(20)[None]


def test_plain_peft_loads_the_adapter_with_the_same_logits(
    model: PeftModel, model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    assert export_adapter(model, tokenizer, tmp_path / "adapter", {"step": 3}) == []
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert json.loads((tmp_path / "adapter" / "run_manifest.json").read_text()) == {"step": 3}
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").get_vocab() == tokenizer.get_vocab()


def test_tensors_that_learned_nothing_are_named(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    fresh = add_adapter(AutoModelForCausalLM.from_pretrained(model_dir), AdapterConfig(r=2))
    zeros = export_adapter(fresh, tokenizer, tmp_path / "adapter", {})
    assert len(zeros) == 14
    assert all("lora_B" in name for name in zeros)


def test_an_export_replaces_the_one_before_as_a_whole(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for number in (1, 2):
        export_adapter(model, tokenizer, tmp_path / "adapter", {"number": number})
        (tmp_path / "adapter" / f"left_{number}").touch()
    assert not (tmp_path / "adapter" / "left_1").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def damaged(change: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = sorted(weights)[0]
    if change == "missing":
        return {key: tensor for key, tensor in weights.items() if key != name}
    if change == "empty":
        return {**weights, name: torch.zeros(0)}
    return {**weights, name: weights[name] + 1}


@pytest.mark.parametrize(("change", "said"), [("missing", "missing"), ("empty", "was written as"), ("other", "values")])
def test_a_file_that_is_not_what_is_live_is_found_and_gets_no_name(
    change: str,
    said: str,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = PeftModel.save_pretrained

    def save_damaged(self: PeftModel, folder: str, **options: Any) -> None:
        save(self, folder, **options)
        file = Path(folder) / "adapter_model.safetensors"
        save_file(damaged(change, load_file(file)), file)

    monkeypatch.setattr(PeftModel, "save_pretrained", save_damaged)
    with pytest.raises(RuntimeError, match=said):
        export_adapter(model, tokenizer, tmp_path / "adapter", {})
    assert not (tmp_path / "adapter").exists()


def test_a_whole_model_is_loaded_by_plain_transformers(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    live = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    export_model(live, tokenizer, tmp_path / "model", {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, live(IDS).logits)
    assert (tmp_path / "model" / export.MANIFEST).exists()
