"""Shared by callbacks that write: the run folder, the manifest of exported folders, and text for the loggers."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from sft_lightning import __version__
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.startup import datamodule_of


def run_folder(trainer: Trainer) -> Path:
    """Return `trainer.default_root_dir`, whatever the loggers are: each puts its own files elsewhere."""
    return Path(trainer.default_root_dir)


def run_manifest(trainer: Trainer, module: CausalLMModule) -> dict[str, Any]:
    """Return how the weights were made: versions, base, template, optimizer steps, and what was checked.

    Args:
        trainer: The run's trainer.
        module: The trained module.
    """
    datamodule = datamodule_of(trainer)
    chat_template = str(datamodule.tokenizer.chat_template or "")
    return {
        "sft_lightning": __version__,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "lightning")},
        "base": module.spec.model_name_or_path,
        "base_fingerprint": module.base_fingerprint,
        "task": datamodule.spec.task,
        "template": datamodule.template.name,
        "chat_template_sha256": hashlib.sha256(chat_template.encode()).hexdigest(),
        "optimizer_steps": trainer.global_step,
        "epoch": trainer.current_epoch,
        "checks": module.checks.as_dicts(),
    }


def log_text(trainer: Trainer, tag: str, markdown: str) -> None:
    """Log text to TensorBoard and Weights & Biases; other loggers only take numbers.

    Args:
        trainer: The run's trainer.
        tag: Name of the text.
        markdown: The text.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, markdown, trainer.global_step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(tag, columns=["text"], data=[[markdown]], step=trainer.global_step)
