from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sft_lightning.__main__ import main
from sft_lightning.errors import UserError
from sft_lightning.models.adapters import AdapterConfig, add_adapter
from sft_lightning.models.export import export_adapter
from sft_lightning.models.merging import merge_adapters

IDS = torch.arange(20)[None]


def make_adapter(base: Path, tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = add_adapter(AutoModelForCausalLM.from_pretrained(base), AdapterConfig(r=2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    export_adapter(model, tokenizer, folder, {})
    return folder


@pytest.fixture
def adapter(model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    return make_adapter(model_dir, tokenizer, tmp_path / "adapter", 0)


def test_the_merged_model_answers_like_the_adapted_one(model_dir: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, atol=1e-4, rtol=0)
    assert report.max_logit_difference < 1e-4 < report.moved


def test_several_adapters_are_merged_in_order(
    model_dir: Path, adapter: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    second = make_adapter(model_dir, tokenizer, tmp_path / "second", 1)
    merge_adapters([str(adapter), str(second)], str(tmp_path / "both"))
    merge_adapters([str(adapter)], str(tmp_path / "one"))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "one"), second).eval()
    both = AutoModelForCausalLM.from_pretrained(tmp_path / "both").eval()
    with torch.no_grad():
        torch.testing.assert_close(both(IDS).logits, adapted(IDS).logits, atol=1e-4, rtol=0)


def test_a_coarser_type_is_the_float32_merge_rounded_once(adapter: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        merge_adapters([str(adapter)], str(tmp_path / dtype), dtype=dtype)
    fine, coarse = (
        AutoModelForCausalLM.from_pretrained(tmp_path / dtype, dtype="auto").state_dict()
        for dtype in ("float32", "bfloat16")
    )
    assert all(torch.equal(tensor.bfloat16(), coarse[name]) for name, tensor in fine.items())


def test_a_merged_folder_that_answers_otherwise_is_an_error(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self: self.unload())
    with pytest.raises(RuntimeError, match="more than rounding"):
        merge_adapters([str(adapter)], str(tmp_path / "merged"))


def test_what_is_no_adapter_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an adapter folder"):
        merge_adapters([str(model_dir)], str(tmp_path / "merged"))


def test_a_base_that_is_gone_is_named(model_dir: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load a model from 'nowhere/at/all'"):
        merge_adapters([str(adapter)], str(tmp_path / "merged"), base="nowhere/at/all")


def test_adapters_of_different_bases_are_refused(
    model_dir: Path, adapter: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    shutil.copytree(model_dir, tmp_path / "other_base")
    other = make_adapter(tmp_path / "other_base", tokenizer, tmp_path / "other", 0)
    with pytest.raises(UserError, match="different bases"):
        merge_adapters([str(adapter), str(other)], str(tmp_path / "merged"))


def test_the_command_merges_and_reports(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--adapter", str(adapter), "--output_dir", str(tmp_path / "merged")]) == 0
    assert "logits differ from the adapted model's by at most" in capsys.readouterr().out
