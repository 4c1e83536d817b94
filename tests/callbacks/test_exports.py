from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from callbacks.exports import AdapterExport
from sft_lightning.__main__ import main
from sft_lightning.models.adapters.trained_base import base_fingerprint
from sft_lightning.training.module import CausalLMModule

CHECKPOINTS = (
    "--trainer.callbacks+={class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: "
    "{filename: '{step}', every_n_train_steps: 2, save_top_k: 2, monitor: step, mode: max, save_last: true}}"
)


def test_each_kept_checkpoint_has_an_adapter_and_no_other_has(fit: Callable[..., Path]) -> None:
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
    assert manifest["base_fingerprint"] == base_fingerprint(str(model_dir))


def test_the_manifest_has_the_facts_about_the_base_that_merge_requires(fit: Callable[..., Path]) -> None:
    run = fit("--trainer.max_steps=1", "--model.quantization.bits=4")
    manifest = json.loads((run / "adapter" / "run_manifest.json").read_text())
    assert manifest["quantization"]["bits"] == 4
    assert manifest["dtype"] == "float32"
    assert manifest["vocab_size"] == AutoTokenizer.from_pretrained(run / "adapter").vocab_size
    assert manifest["rope_parameters"]["rope_type"] == "default"


@pytest.mark.end_to_end
def test_the_logits_of_the_final_export_are_verified(fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("callbacks.exports.rank_zero_info", said.append)
    fit("--trainer.max_steps=1")
    assert any("loaded by PEFT, its logits differ from the trained model's by 0.0e+00" in line for line in said)


def test_an_adapter_trained_in_bfloat16_is_exported_in_bfloat16(fit: Callable[..., Path]) -> None:
    run = fit("--trainer.max_steps=2", "--model.dtype=bfloat16", "--trainer.precision=bf16-true")
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_verifying_exports_changes_no_learned_weight(
    fit: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = []
    for probed in (True, False):
        monkeypatch.setattr("sft_lightning.models.export.write.is_sharded", lambda model, probed=probed: not probed)
        options = ("--trainer.max_steps=4", "--model.adapter.dropout=0.3", CHECKPOINTS)
        run = fit(*options)
        learned.append(load_file(run / "adapter" / "adapter_model.safetensors"))
        run.rename(tmp_path / f"run_{probed}")
    assert all(torch.equal(tensor, learned[1][name]) for name, tensor in learned[0].items())


def test_an_export_that_differs_from_the_trained_model_stops_the_run(
    fit_args: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sft_lightning.models.export.write.export_difference", lambda *args, **options: (1.0, 1.0))
    with pytest.raises(RuntimeError, match="has other logits than the trained model"):
        main(["fit", *fit_args, "--trainer.max_steps=1"])
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.end_to_end
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


@pytest.mark.parametrize("name", ["adapter", pytest.param("model", marks=pytest.mark.slow)])
def test_a_finished_run_without_its_export_writes_it_when_it_is_continued(
    name: str, fit_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = fit_args if name == "adapter" else [arg for arg in fit_args if "adapter" not in arg]
    args = ["fit", *args, "--trainer.max_steps=2"]
    run = tmp_path / "run"

    def full_disk(*given: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"callbacks.exports.{name.title()}Export._write", full_disk)
        with pytest.raises(OSError, match="No space left"):
            main(args)
    assert not (run / name).exists()
    for left in (run / f".{name}.new", run / "checkpoints" / ".last.adapter.new"):  # of a process that was killed
        left.mkdir(parents=True)
    said: list[str] = []
    monkeypatch.setattr("callbacks.exports.rank_zero_info", said.append)
    assert main([*args, "--ckpt_path=last"]) == 0
    assert not list(run.glob("**/.*.new"))
    assert any("nothing is left to train, but" in line for line in said)
    assert any(line.startswith(f"{name}: ") and "(verified: read again" in line for line in said)
    [weights] = (run / name).glob("*.safetensors")
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    exported = load_file(weights)
    assert len(exported) == len(saved)
    for key, tensor in exported.items():
        assert torch.equal(
            tensor, saved["model." + (key.replace(".weight", ".default.weight") if name == "adapter" else key)]
        )
    said.clear()
    before = weights.stat().st_mtime_ns
    assert main([*args, "--ckpt_path=last"]) == 0
    assert weights.stat().st_mtime_ns == before
    assert not any("nothing is left" in line for line in said)


class Diverges(Callback):
    """Makes a weight not-a-number after optimizer step 3."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *rest: object) -> None:
        if trainer.global_step == 3:
            next(weight for weight in pl_module.parameters() if weight.requires_grad).data.fill_(torch.nan)


def test_a_diverging_run_keeps_its_finite_checkpoints_and_names_the_newest(
    fit_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("callbacks.Throughput", Diverges)
    assert main(["fit", *fit_args, "--trainer.max_steps=6", CHECKPOINTS]) == 2
    error = capsys.readouterr().err
    assert "the weights are NaN or infinite after optimizer step 4" in error
    assert "last.ckpt'. Continue from a finite checkpoint" in error
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("*.ckpt")) == ["last.ckpt", "step=2.ckpt"]
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 2
    without = ["--trainer.enable_checkpointing=false", f"--trainer.default_root_dir={tmp_path / 'other'}"]
    assert main(["fit", *fit_args, "--trainer.max_steps=6", *without]) == 2
    assert "tensors are NaN or infinite, such as" in capsys.readouterr().err
    assert not (tmp_path / "other" / "adapter").exists()


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
messages = [{"role": "user", "content": "Hi"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(ids["input_ids"][0]).count("### Response:"), len(model.generate(**ids, max_new_tokens=2)))
"""


@pytest.mark.slow
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


@pytest.mark.parametrize("fault", ["a reset model", "an earlier step", "no template"])
def test_a_run_whose_final_adapter_is_not_what_was_trained_stops_and_leaves_none(
    fault: str, fit_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Covers sft_lightning.training.checks.export and sft_lightning.training.checks.exported_tokenizer."""
    write = AdapterExport._write

    def faulty(self: AdapterExport, trainer: Trainer, module: CausalLMModule, folder: Path) -> None:
        if fault == "a reset model":
            for name, parameter in module.named_parameters():
                if "lora_B" in name:
                    parameter.data.fill_(0.1)
        elif fault == "an earlier step":
            manifest = "callbacks.exports.run_manifest"
            monkeypatch.setattr(manifest, lambda *given: {"optimizer_steps": trainer.global_step - 1})
        else:
            module.data.tokenizer.chat_template = None
        write(self, trainer, module, folder)

    monkeypatch.setattr(AdapterExport, "_write", faulty)
    assert main(["fit", *fit_args, "--trainer.max_steps=1", "--trainer.enable_checkpointing=false"]) == 1
    error = capsys.readouterr().err
    assert "check failed: exported " + ("tokenizer" if fault == "no template" else "weights") in error
    assert not (tmp_path / "run" / "adapter").exists()
    assert len(list((tmp_path / "run").glob("adapter.rejected-*"))) == 1
