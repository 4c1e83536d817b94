from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, MixtralConfig, PreTrainedTokenizerFast

from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.export import write as export
from sft_lightning.models.export.write import export_adapter, export_model


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
    report = export_adapter(model, tokenizer, tmp_path / "adapter", {"step": 3}, stop_token_id=2)
    assert (report.zeros, report.base_weights, report.logit_difference) == ([], [], 0.0)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert json.loads((tmp_path / "adapter" / "run_manifest.json").read_text()) == {"step": 3}
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").get_vocab() == tokenizer.get_vocab()


def test_tensors_that_learned_nothing_are_named(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    fresh = add_adapter(AutoModelForCausalLM.from_pretrained(model_dir), AdapterConfig(r=2))
    zeros = export_adapter(fresh, tokenizer, tmp_path / "adapter", {}, stop_token_id=2).zeros
    assert len(zeros) == 14
    assert all("lora_B" in name for name in zeros)


def test_an_export_replaces_an_earlier_one_as_a_whole(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for number in (1, 2):
        export_adapter(model, tokenizer, tmp_path / "adapter", {"number": number}, stop_token_id=2)
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


@pytest.mark.parametrize(("change", "said"), [("missing", "missing"), ("empty", "with the shape"), ("other", "values")])
def test_a_file_that_differs_from_the_live_weights_is_an_error_and_leaves_no_folder(
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
        export_adapter(model, tokenizer, tmp_path / "adapter", {}, stop_token_id=2)
    assert not (tmp_path / "adapter").exists()


def test_a_whole_model_is_loaded_by_plain_transformers(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    live = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    export_model(live, tokenizer, tmp_path / "model", {}, stop_token_id=2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, live(IDS).logits)
    assert (tmp_path / "model" / export.MANIFEST).exists()


def test_an_export_does_not_store_the_attention_implementation(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    live = AutoModelForCausalLM.from_pretrained(model_dir)
    live.set_attn_implementation("eager")
    export_model(live, tokenizer, tmp_path / "model", {}, stop_token_id=2)
    assert not any("attn_implementation" in key for key in json.loads((tmp_path / "model/config.json").read_text()))


def test_a_family_whose_files_have_other_names_than_its_modules_is_exported(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    live = AutoModelForCausalLM.from_config(config).eval()
    export_model(live, tokenizer, tmp_path / "model", {}, stop_token_id=2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, live(IDS).logits)


def test_a_whole_model_that_is_written_incompletely_is_an_error(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = AutoModelForCausalLM.from_pretrained(model_dir)
    save = type(live).save_pretrained

    def save_damaged(self: Any, folder: Path, **options: Any) -> None:
        save(self, folder, **options)
        weights = load_file(folder / "model.safetensors")
        weights.pop("lm_head.weight")
        save_file(weights, folder / "model.safetensors")

    monkeypatch.setattr(type(live), "save_pretrained", save_damaged)
    with pytest.raises(RuntimeError, match=r"tensors are missing in the written files: \['lm_head.weight'\]"):
        export_model(live, tokenizer, tmp_path / "model", {}, stop_token_id=2)
    assert list(tmp_path.iterdir()) == []


def test_conv1d_layers_and_tied_embeddings_are_exported(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2))
    adapted = add_adapter(base, AdapterConfig(r=2, target_modules=["c_attn"], modules_to_save=["wte"]))
    assert export_adapter(adapted, tokenizer, tmp_path / "adapter", {}, stop_token_id=2).logit_difference == 0.0
