"""Exports: the adapter with every checkpoint and at the end of the run, or the full model at the end."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from peft import PeftModel
from transformers import PreTrainedModel

from callbacks.run_outputs import run_folder, run_manifest
from sft_lightning.models.export.write import AdapterReport, export_adapter, export_model
from sft_lightning.strategies.services import services_of
from sft_lightning.training.checkpoint.files import AtomicCheckpointIO
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.startup import datamodule_of


class AdapterExport(Callback):
    """Write `adapter/` at the end of the run, and `checkpoints/<name>.adapter/` with each `checkpoints/<name>.ckpt`.

    Each export is read again and compared with the trained weights (keys, shapes, values). PEFT then loads it onto the
    base, and its logits on a probe must be those of the trained model. The folder includes the tokenizer and its chat
    template. Does nothing without an adapter.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        checkpoint_io = trainer.strategy.checkpoint_io
        if stage == "fit" and isinstance(checkpoint_io, AtomicCheckpointIO):
            checkpoint_io.after_save.append(lambda path: self._save_adapter_folder(trainer, pl_module, path))
            checkpoint_io.after_remove.append(lambda path: shutil.rmtree(_adapter_folder(path), ignore_errors=True))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, CausalLMModule) or not isinstance(pl_module.language_model, PeftModel):
            return
        folder = run_folder(trainer) / "adapter"
        with services_of(trainer.strategy).full_weights():
            report = self._export(trainer, pl_module, folder)
        if report is not None:
            rank_zero_info(f"adapter: {folder} ({_verification(report)})")

    def _save_adapter_folder(self, trainer: Trainer, module: LightningModule, checkpoint: Path) -> None:
        self._export(trainer, module, _adapter_folder(checkpoint))

    @rank_zero_only
    def _export(self, trainer: Trainer, module: LightningModule, folder: Path) -> AdapterReport | None:
        if not isinstance(module, CausalLMModule) or not isinstance(module.language_model, PeftModel):
            return None
        tokenizer = datamodule_of(trainer).tokenizer
        manifest = {**run_manifest(trainer, module), **_base_facts(module)}
        precision = trainer.precision_plugin.forward_context
        report = export_adapter(module.language_model, tokenizer, folder, manifest, precision=precision)
        if report.zeros:
            rank_zero_info(
                f"{folder}: {len(report.zeros)} adapter tensors are all zero, so they have not learned anything yet: "
                f"{report.zeros[0]} …"
            )
        return report


class ModelExport(Callback):
    """Write `model/` at the end of full fine-tuning, with the tokenizer, for `AutoModelForCausalLM.from_pretrained`.

    Does nothing with an adapter.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, CausalLMModule) or isinstance(pl_module.language_model, PeftModel):
            return
        model = pl_module.language_model
        with services_of(trainer.strategy).full_weights():
            self._export(trainer, pl_module, model)

    @rank_zero_only
    def _export(self, trainer: Trainer, module: CausalLMModule, model: PreTrainedModel) -> None:
        folder = run_folder(trainer) / "model"
        export_model(model, datamodule_of(trainer).tokenizer, folder, run_manifest(trainer, module))
        rank_zero_info(f"model: {folder} (verified: read again, its values equal the trained weights)")


def _verification(report: AdapterReport) -> str:
    text = "verified: read again, its keys, shapes and values equal the trained weights"
    if report.base_weights:
        text += f", including {len(report.base_weights)} trained weights of the base"
    if report.logit_difference is None:
        return f"{text}; logits not compared, because no process has the full model"
    return f"{text}; loaded by PEFT, its logits differ from the trained model's by {report.logit_difference:.1e}"


def _base_facts(module: CausalLMModule) -> dict[str, Any]:
    """Return the facts about the base that `merge` requires and an adapter folder lacks."""
    text = module.base_model.config.get_text_config()
    return {
        "dtype": module.spec.dtype,
        "quantization": None if module.spec.quantization is None else asdict(module.spec.quantization),
        "vocab_size": text.vocab_size,
        "rope_parameters": getattr(text, "rope_parameters", None),
        "max_position_embeddings": getattr(text, "max_position_embeddings", None),
    }


def _adapter_folder(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".adapter")
