"""The adapter as others load it, beside every checkpoint kept and at the end of the run."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from peft import PeftModel

from callbacks.run_folder import datamodule_of, run_folder, run_manifest
from sft_lightning.models.export import export_adapter
from sft_lightning.training.checkpoint import AtomicCheckpointIO
from sft_lightning.training.module import CausalLMModule


class AdapterExport(Callback):
    """Writes `adapter/` at the end, and `checkpoints/<name>.adapter/` beside `checkpoints/<name>.ckpt`.

    Every export is opened again and compared with the live weights: keys, shapes, values. The tokenizer with its chat
    template lies beside the weights. Without an adapter there is nothing to do.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        checkpoint_io = trainer.strategy.checkpoint_io
        if stage == "fit" and isinstance(checkpoint_io, AtomicCheckpointIO):
            checkpoint_io.after_save.append(lambda path: self._export(trainer, pl_module, _beside(path)))
            checkpoint_io.after_remove.append(lambda path: shutil.rmtree(_beside(path), ignore_errors=True))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer) / "adapter"
        self._export(trainer, pl_module, folder)
        if folder.exists():
            rank_zero_info(f"adapter: {folder} (opened again: keys, shapes and values are those of the trained model)")

    @rank_zero_only
    def _export(self, trainer: Trainer, module: LightningModule, folder: Path) -> None:
        if not isinstance(module, CausalLMModule) or not isinstance(module.language_model, PeftModel):
            return
        tokenizer = datamodule_of(trainer).tokenizer
        zeros = export_adapter(module.language_model, tokenizer, folder, run_manifest(trainer, module))
        if zeros:
            rank_zero_info(
                f"{folder}: {len(zeros)} adapter tensors are all zero, they have not learned anything yet: {zeros[0]}…"
            )


def _beside(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".adapter")
