"""Defaults of a run: optimizer, trainer, run folder, callbacks, checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar

import callbacks as observers
from callbacks.checkpoints import default_checkpoints
from sft_lightning.strategies.preemption import Preemption

DEFAULT_OPTIMIZER: dict[str, Any] = {
    "class_path": "torch.optim.AdamW",
    "init_args": {"lr": 2e-4, "weight_decay": 0.0, "fused": True},
}

TRAINER_DEFAULTS: dict[str, Any] = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
}


def default_run_folder(config_files: Sequence[Any] | None) -> str:
    """Return `runs/` and the name of the first config file, or `runs/sft` without one."""
    return f"runs/{Path(str(config_files[0])).stem if config_files else 'sft'}"


def with_default_callbacks(given: Any, *, progress_bar: bool, checkpoints: bool) -> list[Callback]:
    """Return the user's callbacks, and a default one of every kind that the user did not give.

    Args:
        given: `trainer.callbacks`: a list, one callback or `None`.
        progress_bar: Whether to show progress.
        checkpoints: Whether to save checkpoints.
    """
    found: list[Callback] = list(given) if isinstance(given, Iterable) else [given] if given else []
    defaults: list[Callback] = [
        observers.HyperParameters(),
        observers.DataSummary(),
        observers.FirstStep(),
        observers.SampleGeneration(),
        observers.AdapterExport(),
        observers.ModelExport(),
        observers.Throughput(),
        observers.PredictionWriter(),
        Preemption(),
    ]
    if progress_bar:
        defaults.append(observers.RunProgress())
    for default in defaults:
        kind = ProgressBar if isinstance(default, ProgressBar) else type(default)
        if not any(isinstance(callback, kind) for callback in found):
            found.append(default)
    return [*found, *default_checkpoints(found)] if checkpoints else found
