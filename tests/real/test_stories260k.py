"""A real pretrained model on a real instruction file, from YAML to an adapter that plain PEFT serves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from sft_lightning.__main__ import main

PROBE = torch.arange(3, 67)[None]

SERVE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, adapter, bits, out = sys.argv[1:]
four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                          bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(
    base, dtype=torch.float32, quantization_config=four if bits == "4" else None)
for module in model.modules():  # bitsandbytes' faster CPU kernel computes in bfloat16
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    torch.save(model(torch.arange(3, 67)[None]).logits, out)
"""


class KeepLogits(Callback):
    """The live model's logits at the end of training."""

    def __init__(self, path: str) -> None:
        self.path = path

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = pl_module.model
        model.eval()
        torch.save(model(PROBE).logits, self.path)
        model.train()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [pytest.param("16", id="lora"), pytest.param("4", id="qlora")])
def test_an_adapter_trained_on_real_data_is_served_by_plain_peft_with_the_same_logits(
    bits: str, real_data: Path, tmp_path: Path
) -> None:
    base = real_data / "model" / "stories260K"
    args = [
        f"--model.model_name_or_path={base}", "--model.dtype=float32", "--model.adapter={r: 8, alpha: 16}",
        "--model.optimizer={class_path: torch.optim.AdamW, init_args: {lr: 3.0e-3, fused: true}}",
        "--model.lr_scheduler.warmup_ratio=0.03",
        f"--data.sources={{rasbt: {{path: {real_data}/instruct/rasbt_instruction_data.json, format: alpaca}}}}",
        "--data.val_fraction=0.05", "--data.template=alpaca", "--data.max_length=512", "--data.batch_size=2",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        f"--trainer.callbacks+={{class_path: {__name__}.KeepLogits, init_args: {{path: {tmp_path / 'live.pt'}}}}}",
        *(["--model.quantization.bits=4"] if bits == "4" else []),
    ]  # fmt: skip
    assert main(["validate", *args]) == 0
    assert main(["fit", *args]) == 0
    served = tmp_path / "served.pt"
    subprocess.run([sys.executable, "-c", SERVE, base, tmp_path / "run" / "adapter", bits, served], check=True)
    assert (torch.load(served) - torch.load(tmp_path / "live.pt")).abs().max() <= 1e-5
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["sources"]["train/rasbt"]["records"] == 1045
    assert report["sources"]["val/rasbt"]["records"] == 55
