"""Exports: the adapter with every checkpoint and at the end of the run, or the full model at the end."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from peft import PeftModel

from callbacks.run_outputs import run_folder, run_manifest
from sft_lightning.compat.lightning.loops import call_after_training
from sft_lightning.models.export.target import is_export_of, mend_folder, mend_folders
from sft_lightning.models.export.write import AdapterReport, export_adapter, export_model
from sft_lightning.strategies.services import services_of
from sft_lightning.training.checkpoint.files import AtomicCheckpointIO
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.startup import datamodule_of


class _FinalExport(Callback):
    """Writes a folder at the end of the run, and when a finished run is continued without it."""

    folder_name = ""

    def __init__(self) -> None:
        self._is_written = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove what a killed export left, and find out after training whether the export is missing."""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.is_global_zero:
            mend_folder(run_folder(trainer) / self.folder_name)
        call_after_training(trainer, lambda: self._write_missing(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder."""
        if not self._applies_to(pl_module):
            return
        with services_of(trainer.strategy).full_weights():
            self._write(trainer, pl_module, run_folder(trainer) / self.folder_name)
        self._is_written = True

    def _write_missing(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the folder if nothing was left to train and it is not of the weights that were loaded."""
        if self._is_written or trainer.global_step == 0 or not self._applies_to(module):
            return
        folder = run_folder(trainer) / self.folder_name
        if trainer.strategy.broadcast(is_export_of(folder, trainer.global_step)):
            return
        rank_zero_info(f"nothing is left to train, but {folder} is missing or older; writing it now")
        self.on_train_end(trainer, module)

    def _applies_to(self, module: LightningModule) -> bool:
        raise NotImplementedError

    def _write(self, trainer: Trainer, module: Any, folder: Path) -> None:
        raise NotImplementedError


class AdapterExport(_FinalExport):
    """Write `adapter/` at the end of the run, and `checkpoints/<name>.adapter/` with each `checkpoints/<name>.ckpt`.

    Each export is read again and compared with the trained weights (keys, shapes, values). PEFT then loads it onto the
    base, and its logits on a probe must be those of the trained model. The folder includes the tokenizer and its chat
    template. A finished run that is continued writes `adapter/` if it is missing. Does nothing without an adapter.
    """

    folder_name = "adapter"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Export with each checkpoint."""
        super().setup(trainer, pl_module, stage)
        checkpoint_io = trainer.strategy.checkpoint_io
        if stage == "fit" and isinstance(checkpoint_io, AtomicCheckpointIO):
            checkpoint_io.after_save.append(lambda path: self._save_adapter_folder(trainer, pl_module, path))
            checkpoint_io.after_remove.append(lambda path: shutil.rmtree(_adapter_folder(path), ignore_errors=True))
            self._mend_adapter_folders(trainer)

    @rank_zero_only
    def _mend_adapter_folders(self, trainer: Trainer) -> None:
        for callback in trainer.checkpoint_callbacks:
            if folder := getattr(callback, "dirpath", None):
                mend_folders(Path(folder), "*.adapter")

    def _save_adapter_folder(self, trainer: Trainer, module: Any, checkpoint: Path) -> None:
        if self._applies_to(module):
            self._export(trainer, module, _adapter_folder(checkpoint))

    def _applies_to(self, module: LightningModule) -> bool:
        return isinstance(module, CausalLMModule) and isinstance(module.language_model, PeftModel)

    def _write(self, trainer: Trainer, module: Any, folder: Path) -> None:
        report = self._export(trainer, module, folder)
        if report is not None:
            rank_zero_info(f"adapter: {folder} ({_verification(report)})")

    @rank_zero_only
    def _export(self, trainer: Trainer, module: CausalLMModule, folder: Path) -> AdapterReport:
        data = datamodule_of(trainer)
        manifest = {**run_manifest(trainer, module), **_base_facts(module)}
        precision = trainer.precision_plugin.forward_context
        model: Any = module.language_model
        report = export_adapter(
            model, data.tokenizer, folder, manifest, stop_token_id=data.stop_token_id, precision=precision
        )
        if report.zeros:
            rank_zero_info(
                f"{folder}: {len(report.zeros)} adapter tensors are all zero, so they have not learned anything yet: "
                f"{report.zeros[0]} …"
            )
        return report


class ModelExport(_FinalExport):
    """Write `model/` at the end of full fine-tuning, with the tokenizer, for `AutoModelForCausalLM.from_pretrained`.

    A finished run that is continued writes it if it is missing. Does nothing with an adapter.
    """

    folder_name = "model"

    def _applies_to(self, module: LightningModule) -> bool:
        return isinstance(module, CausalLMModule) and not isinstance(module.language_model, PeftModel)

    @rank_zero_only
    def _write(self, trainer: Trainer, module: Any, folder: Path) -> None:
        data, manifest = datamodule_of(trainer), run_manifest(trainer, module)
        export_model(module.language_model, data.tokenizer, folder, manifest, stop_token_id=data.stop_token_id)
        rank_zero_info(f"model: {folder} (verified: read again, its values equal the trained weights)")


def _verification(report: AdapterReport) -> str:
    text = "verified: read again, its keys, shapes and values equal the trained weights"
    if report.base_weights:
        text += f", including {len(report.base_weights)} weights of the base"
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
