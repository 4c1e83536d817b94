"""Covers sft_lightning.models.export.check and its use by sft_lightning.models.export.write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.quantization import load_quantized
from sft_lightning.models.export.check import copy_without_adapters, export_difference
from sft_lightning.models.export.write import export_adapter


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

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora with a rank pattern": {"use_rslora": True, "rank_pattern": {"q_proj": 4}},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "bias": {"bias": "all"},
    "token indices": {"trainable_token_indices": [3, 4]},
    "pissa": {"init": "pissa"},
    "everything trains": {"only_adapter": False},
    "ia3": {
        "peft_config": IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        )
    },
}
BASES: dict[str, tuple[torch.dtype, QuantizationConfig | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "nf4": (torch.bfloat16, QuantizationConfig(bits=4)),
    "int8": (torch.float32, QuantizationConfig(bits=8)),
}
_IMPOSSIBLE = {("pissa", "nf4"), ("pissa", "int8")}  # PEFT computes them from the base's values


def trained(folder: Path, adapter: str, base: str) -> PeftModel:
    dtype, quantization = BASES[base]
    if quantization is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        model = load_quantized(str(folder), quantization, dtype=dtype)
    settings = KINDS[adapter] if "peft_config" in KINDS[adapter] else {"r": 2, "dropout": 0.1, **KINDS[adapter]}
    adapted = add_adapter(model, AdapterConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return adapted.train()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(("adapter", "base"), [(a, b) for a in KINDS for b in BASES if (a, b) not in _IMPOSSIBLE])
def test_the_exported_adapter_answers_like_the_live_model_which_does_not_change(
    adapter: str, base: str, model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    live = trained(model_dir, adapter, base)
    weights = {name: bits(parameter) for name, parameter in live.named_parameters()}
    trains = {name: parameter.requires_grad for name, parameter in live.named_parameters()}
    random = torch.get_rng_state()
    report = export_adapter(live, tokenizer, tmp_path / "adapter", {}, stop_token_id=2)
    assert report.logit_difference == 0.0
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: parameter.requires_grad for name, parameter in live.named_parameters()} == trains
    assert all(torch.equal(bits(parameter), weights[name]) for name, parameter in live.named_parameters())
    assert all(module.training for module in live.modules())


def test_weights_trained_beside_the_adapter_are_in_the_file_and_loaded_by_plain_peft(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    live = trained(model_dir, "everything trains", "float32").eval()
    report = export_adapter(live, tokenizer, tmp_path / "adapter", {}, stop_token_id=2)
    assert "base_model.model.model.norm.weight" in report.base_weights
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, live(IDS).logits)


def test_a_configuration_that_differs_from_the_live_one_is_found_by_its_logits(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = PeftModel.save_pretrained

    def save_otherwise(self: PeftModel, folder: str, **options: Any) -> None:
        save(self, folder, **options)
        file = Path(folder) / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 1}))

    monkeypatch.setattr(PeftModel, "save_pretrained", save_otherwise)
    with pytest.raises(RuntimeError, match="has other logits than the trained model"):
        export_adapter(model, tokenizer, tmp_path / "adapter", {}, stop_token_id=2)
    assert not (tmp_path / "adapter").exists()


def test_a_configuration_that_expects_other_tensors_is_an_error(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = PeftModel.save_pretrained

    def save_otherwise(self: PeftModel, folder: str, **options: Any) -> None:
        save(self, folder, **options)
        file = Path(folder) / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))

    monkeypatch.setattr(PeftModel, "save_pretrained", save_otherwise)
    with pytest.raises(RuntimeError, match=r"missing base_model.*lora_magnitude_vector"):
        export_adapter(model, tokenizer, tmp_path / "adapter", {}, stop_token_id=2)


def test_a_copy_without_adapters_shares_the_tensors_but_not_the_structure(model: PeftModel, model_dir: Path) -> None:
    base = model.get_base_model()
    copied = copy_without_adapters(base)
    names = dict(AutoModelForCausalLM.from_pretrained(model_dir).named_parameters()).keys()
    assert dict(copied.named_parameters()).keys() == names
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    assert all(parameter.data_ptr() in shared for parameter in copied.parameters())
    copied.model.layers[0] = torch.nn.Identity()  # type: ignore[union-attr, index, operator]
    assert not isinstance(base.model.layers[0], torch.nn.Identity)  # type: ignore[union-attr, index]


def test_the_difference_of_the_logits_comes_with_their_scale(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    export_adapter(model, tokenizer, tmp_path / "adapter", {}, stop_token_id=2)
    with torch.no_grad():
        scale = float(model(IDS).logits.abs().max())
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    difference, new_scale = export_difference(model, tmp_path / "adapter", IDS)
    assert difference > 1e-3
    assert new_scale != scale
