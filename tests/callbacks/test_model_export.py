from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from sft_lightning.__main__ import main


def test_full_fine_tuning_leaves_a_model_that_plain_transformers_loads(
    fit_args: list[str], model_dir: Path, tmp_path: Path
) -> None:
    args = [arg for arg in fit_args if "adapter" not in arg]
    assert main(["fit", *args, "--trainer.max_steps=2"]) == 0
    run = tmp_path / "run"
    assert not (run / "adapter").exists()
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    tuned = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    base = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    assert all(torch.equal(tensor, saved[f"model.{name}"]) for name, tensor in tuned.items())
    assert not torch.equal(tuned["lm_head.weight"], base["lm_head.weight"])


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
messages = [{"role": "user", "content": "Hi"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(ids["input_ids"][0]).count("### Response:"), len(model.generate(**ids, max_new_tokens=2)))
"""


def test_the_model_and_its_tokenizer_load_offline_in_a_fresh_process(fit_args: list[str], tmp_path: Path) -> None:
    args = [arg for arg in fit_args if "adapter" not in arg]
    assert main(["fit", *args, "--trainer.max_steps=1"]) == 0
    folder = tmp_path / "run" / "model"
    assert {"config.json", "generation_config.json", "tokenizer.json", "run_manifest.json", "chat_template.jinja"} <= {
        path.name for path in folder.iterdir()
    }
    command = [sys.executable, "-c", FRESH, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.stdout.split() == ["1", "1"]
