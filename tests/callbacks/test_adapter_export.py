from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

CHECKPOINTS = (
    "--trainer.callbacks+={class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: "
    "{filename: '{step}', every_n_train_steps: 2, save_top_k: 2, monitor: step, mode: max, save_last: true}}"
)


def test_an_adapter_lies_beside_every_checkpoint_kept_and_beside_no_other(fit: Callable[..., Path]) -> None:
    run = fit("--trainer.max_steps=6", CHECKPOINTS)
    kept = {path.stem for path in (run / "checkpoints").glob("*.ckpt")}
    assert kept == {"step=4", "step=6", "last"}
    assert {path.stem for path in (run / "checkpoints").glob("*.adapter")} == kept


def test_an_adapter_has_the_weights_of_its_checkpoint(fit: Callable[..., Path]) -> None:
    run = fit("--trainer.max_steps=4", CHECKPOINTS) / "checkpoints"
    exported = load_file(run / "step=2.adapter" / "adapter_model.safetensors")
    saved = torch.load(run / "step=2.ckpt", weights_only=True)["state_dict"]
    assert len(exported) == len(saved)
    for name, tensor in exported.items():
        wrapped = "model." + name.replace(".weight", ".default.weight")
        assert torch.equal(tensor, saved[wrapped])


def test_the_final_adapter_is_served_with_the_template_it_was_trained_with(
    fit: Callable[..., Path], model_dir: Path
) -> None:
    run = fit("--trainer.max_steps=2")
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert prompt.endswith("### Instruction:\nHi\n\n### Response:")
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), run / "adapter")
    manifest = json.loads((run / "adapter" / "run_manifest.json").read_text())
    assert manifest["optimizer_steps"] == 2
    assert manifest["template"] == "alpaca"
    assert manifest["base"] == str(model_dir)
