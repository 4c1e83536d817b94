"""Exports: the adapter beside every checkpoint and at the end of the run, or the whole model at the end."""

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
from sft_lightning.training.checkpoint import AtomicCheckpointIO
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.startup import datamodule_of


class AdapterExport(Callback):
    """Writes `adapter/` at the end, and `checkpoints/<name>.adapter/` beside `checkpoints/<name>.ckpt`.

    Every export is opened again and compared with the live weights (keys, shapes, values), and then put on the live
    base as PEFT will: the logits of a probe must be the live model's. The tokenizer with its chat template lies beside
    the weights. Without an adapter there is nothing to do.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        checkpoint_io = trainer.strategy.checkpoint_io
        if stage == "fit" and isinstance(checkpoint_io, AtomicCheckpointIO):
            checkpoint_io.after_save.append(lambda path: self._save_beside(trainer, pl_module, path))
            checkpoint_io.after_remove.append(lambda path: shutil.rmtree(_beside(path), ignore_errors=True))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, CausalLMModule) or not isinstance(pl_module.language_model, PeftModel):
            return
        folder = run_folder(trainer) / "adapter"
        with services_of(trainer.strategy).full_weights():
            report = self._export(trainer, pl_module, folder)
        if report is not None:
            rank_zero_info(f"adapter: {folder} ({_proven(report)})")

    def _save_beside(self, trainer: Trainer, module: LightningModule, checkpoint: Path) -> None:
        self._export(trainer, module, _beside(checkpoint))

    @rank_zero_only
    def _export(self, trainer: Trainer, module: LightningModule, folder: Path) -> AdapterReport | None:
        if not isinstance(module, CausalLMModule) or not isinstance(module.language_model, PeftModel):
            return None
        tokenizer = datamodule_of(trainer).tokenizer
        manifest = {**run_manifest(trainer, module), **_of_the_base(module)}
        precision = trainer.precision_plugin.forward_context
        report = export_adapter(module.language_model, tokenizer, folder, manifest, precision=precision)
        if report.zeros:
            rank_zero_info(
                f"{folder}: {len(report.zeros)} adapter tensors are all zero, they have not learned anything yet: "
                f"{report.zeros[0]}…"
            )
        return report


class ModelExport(Callback):
    """Writes `model/`: what `AutoModelForCausalLM.from_pretrained` loads, tokenizer included. Idle with an adapter."""

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
        rank_zero_info(f"model: {folder} (opened again: its values are those of the trained model)")


def _proven(report: AdapterReport) -> str:
    found = "opened again: keys, shapes and values are those of the trained model"
    if report.base_weights:
        found += f", {len(report.base_weights)} weights of the base that trained among them"
    if report.logit_difference is None:
        return f"{found}; logits not compared, because no process has the whole model"
    return f"{found}; loaded by PEFT, its logits differ from the live ones by {report.logit_difference:.1e}"


def _of_the_base(module: CausalLMModule) -> dict[str, Any]:
    """Return what merging has to know of the base that the adapter was trained on, and an adapter does not say."""
    text = module.base_model.config.get_text_config()
    return {
        "dtype": module.spec.dtype,
        "quantization": None if module.spec.quantization is None else asdict(module.spec.quantization),
        "vocab_size": text.vocab_size,
        "rope_parameters": getattr(text, "rope_parameters", None),
        "max_position_embeddings": getattr(text, "max_position_embeddings", None),
    }


def _beside(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".adapter")
