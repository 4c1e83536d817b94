"""Where a run's outputs go, and what an exported folder says of the run that made it."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from sft_lightning import __version__
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.training.module import CausalLMModule


def run_folder(trainer: Trainer) -> Path:
    """Return the logger's folder, or the trainer's root without a logger that has one.

    Not `trainer.log_dir`: that broadcasts, and hangs where one rank asks alone.
    """
    folder = getattr(trainer.logger, "log_dir", None) or getattr(trainer.logger, "save_dir", None)
    return Path(folder or trainer.default_root_dir)


def datamodule_of(trainer: Trainer) -> SFTDataModule:
    """Return the run's data module."""
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, SFTDataModule):
        raise TypeError(f"these callbacks work with an SFTDataModule, not {type(datamodule).__name__}")
    return datamodule


def run_manifest(trainer: Trainer, module: CausalLMModule) -> dict[str, Any]:
    """Return what made the weights: versions, base, template, position."""
    datamodule = datamodule_of(trainer)
    chat_template = str(datamodule.tokenizer.chat_template or "")
    return {
        "sft_lightning": __version__,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "lightning")},
        "base": module.spec.model_name_or_path,
        "task": datamodule.spec.task,
        "template": datamodule.template.name,
        "chat_template_sha256": hashlib.sha256(chat_template.encode()).hexdigest(),
        "optimizer_steps": trainer.global_step,
        "epoch": trainer.current_epoch,
    }
