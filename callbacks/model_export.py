"""The whole model as others load it, at the end of full fine-tuning."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from peft import PeftModel

from callbacks.run_folder import datamodule_of, run_folder, run_manifest
from sft_lightning.models.export.write import export_model
from sft_lightning.training.module import CausalLMModule


class ModelExport(Callback):
    """Writes `model/`: what `AutoModelForCausalLM.from_pretrained` loads, tokenizer included. Idle with an adapter."""

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, CausalLMModule) or isinstance(pl_module.language_model, PeftModel):
            return
        folder = run_folder(trainer) / "model"
        export_model(
            pl_module.language_model, datamodule_of(trainer).tokenizer, folder, run_manifest(trainer, pl_module)
        )
        rank_zero_info(f"model: {folder} (opened again: its values are those of the trained model)")
