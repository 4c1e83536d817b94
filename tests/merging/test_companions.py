from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from sft_lightning.merging.merge import MergeOptions, merge_adapters
from sft_lightning.models.export.stopping import write_stop_tokens

FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
print(prompt, model(torch.tensor([tokenizer(prompt).input_ids])).logits.shape[-1])
"""


@pytest.mark.slow
def test_a_fresh_process_loads_the_folder_offline(
    adapter: Path, model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    templated = AutoTokenizer.from_pretrained(adapter)
    templated.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    templated.save_pretrained(adapter)
    merge_adapters([str(adapter)], str(tmp_path / "merged"))
    kept, stored = (folder / "generation_config.json" for folder in (tmp_path / "merged", model_dir))
    assert kept.read_text() == stored.read_text()
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "merged")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-2:] == ["<user>Hi", str(len(tokenizer))]


def test_the_manifest_names_the_base_the_adapters_and_their_runs(
    adapter: Path, model_dir: Path, tmp_path: Path
) -> None:
    (adapter / "run_manifest.json").write_text(json.dumps({"template": "alpaca"}))
    merge_adapters([str(adapter)], str(tmp_path / "merged"))
    manifest = json.loads((tmp_path / "merged/run_manifest.json").read_text())
    assert manifest["base"] == str(model_dir)
    assert manifest["merged_into"] == "original"
    assert manifest["adapters"] == [str(adapter)]
    assert manifest["runs"] == [{"template": "alpaca"}]
    assert manifest["num_tensors"] == len(load_file(tmp_path / "merged/model.safetensors"))


def test_the_code_of_a_base_is_copied_beside_the_merged_weights(adapter: Path, model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "base")
    (tmp_path / "base/modeling_mine.py").write_text("pass\n")
    merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(model_name_or_path=str(tmp_path / "base")))
    assert (tmp_path / "merged/modeling_mine.py").read_text() == "pass\n"


def test_a_merge_ends_answers_where_the_adapter_does(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, adapter: Path
) -> None:
    write_stop_tokens(adapter, GenerationConfig(eos_token_id=2), [7])
    merge_adapters([str(adapter)], str(tmp_path / "merged"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.generation_config.eos_token_id == [7, 2]
    ids = torch.tensor([[1, 5]])
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[7] = model.model(ids).last_hidden_state[0, -1]  # so that 7 comes next
    assert model.generate(ids, max_new_tokens=9, do_sample=False).tolist() == [[1, 5, 7]]
