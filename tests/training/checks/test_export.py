from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.export.write import export_adapter, export_model
from sft_lightning.training.checks.export import TrainedBits, bits_of, check_weights

STEP = 3


def trained(model: torch.nn.Module, step: int = STEP) -> TrainedBits:
    return TrainedBits(step, bits_of({name: p for name, p in model.named_parameters() if p.requires_grad}))


@pytest.fixture(scope="module")
def model(model_dir: Path) -> PeftModel:
    """An adapted model that has learned something, with a module that is saved in full."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    adapted = add_adapter(base, AdapterConfig(r=2, modules_to_save=["lm_head"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()


@pytest.fixture
def folder(model: PeftModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    export_adapter(model, tokenizer, tmp_path / "adapter", {"optimizer_steps": STEP}, stop_token_id=2)
    return tmp_path / "adapter"


def test_an_adapter_has_the_bits_of_everything_that_was_trained(model: PeftModel, folder: Path) -> None:
    check = check_weights(folder, trained(model), has_updated=True)
    assert check.passed
    assert check.figure == "29 of 29 trained tensors have the bits of step 3"


def test_an_adapter_of_another_step_is_found_by_its_manifest(model: PeftModel, folder: Path) -> None:
    check = check_weights(folder, trained(model, step=4), has_updated=True)
    assert check.passed is False
    assert "is of optimizer step 3, and the run is at step 4" in check.figure


@pytest.mark.parametrize("fault", ["a value", "a layer"])
def test_an_adapter_with_another_value_or_without_a_layer_is_found(model: PeftModel, folder: Path, fault: str) -> None:
    file = folder / "adapter_model.safetensors"
    written = load_file(file)
    name = next(name for name in written if "layers.1.self_attn.q_proj.lora_B" in name)
    if fault == "a value":
        written[name][0, 0] *= 1 + 1e-6
    else:
        del written[name]
    save_file(written, file)
    check = check_weights(folder, trained(model), has_updated=True)
    assert check.passed is False
    assert "1 of 29 trained tensors" in check.figure
    assert "layers.1.self_attn.q_proj.lora_B" in check.figure


def test_an_adapter_of_zeros_is_refused_unless_every_rate_was_zero(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    fresh = add_adapter(AutoModelForCausalLM.from_pretrained(model_dir), AdapterConfig(r=2))
    export_adapter(fresh, tokenizer, tmp_path / "adapter", {"optimizer_steps": STEP}, stop_token_id=2)
    check = check_weights(tmp_path / "adapter", trained(fresh), has_updated=True)
    assert check.passed is False
    assert "has learned nothing: all of its 14 B matrices are zero" in check.figure
    assert check_weights(tmp_path / "adapter", trained(fresh), has_updated=False).passed


def test_a_whole_model_is_compared_by_name(model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    live = AutoModelForCausalLM.from_pretrained(model_dir)
    export_model(live, tokenizer, tmp_path / "model", {"optimizer_steps": STEP}, stop_token_id=2)
    before = trained(live)
    assert check_weights(tmp_path / "model", before, has_updated=True).passed
    with torch.no_grad():
        live.lm_head.weight[0, 0] += 1
    check = check_weights(tmp_path / "model", trained(live), has_updated=True)
    assert check.passed is False
    assert "lm_head.weight" in check.figure


def test_files_with_other_names_than_the_weights_are_left_to_the_export(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    live = AutoModelForCausalLM.from_pretrained(model_dir)
    export_model(live, tokenizer, tmp_path / "model", {"optimizer_steps": STEP}, stop_token_id=2)
    other = TrainedBits(STEP, {f"experts.{name}": bits for name, bits in trained(live).bits.items()})
    assert check_weights(tmp_path / "model", other, has_updated=True).passed is None


def test_the_bits_of_a_tensor_change_with_any_value() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        one = torch.arange(6).to(dtype).reshape(2, 3)
        other = one.clone()
        other[1, 2] += 1
        assert bits_of({"x": one}) == bits_of({"x": one.clone()})
        assert bits_of({"x": one}) != bits_of({"x": other})
    assert bits_of({"x": torch.zeros(2)}) != bits_of({"x": torch.zeros(2, 1)})
    assert bits_of({}) == {}


def test_a_folder_without_a_manifest_step_is_no_export_of_this_run(model: PeftModel, folder: Path) -> None:
    (folder / "run_manifest.json").write_text(json.dumps({}))
    assert check_weights(folder, trained(model), has_updated=True).passed is False
