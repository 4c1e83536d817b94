from __future__ import annotations

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
