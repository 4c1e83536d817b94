"""The trainer of a run: its folder, callbacks, strategy and checkpoints where the configuration leaves them open."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

import callbacks as observers
from callbacks.checkpoints import default_checkpoints, set_folders
from sft_lightning.errors import UserError
from sft_lightning.strategies.names import check_name
from sft_lightning.strategies.preemption import Preemption
from sft_lightning.strategies.registry import register_strategies
from sft_lightning.training.checkpoint.files import AtomicCheckpointIO
from sft_lightning.training.checkpoint.run_folder import check_run_folder, checkpoint_to_load
from sft_lightning.training.checkpoint.run_lock import lock_run_folder

register_strategies()


def complete_config(
    config: Any, *, trains: bool, config_files: Sequence[Any] | None, ckpt_path: str | None
) -> str | None:
    """Fill in what `trainer` leaves open, in place, and find the checkpoint to load.

    Args:
        config: The parsed values under `trainer`.
        trains: Whether the command is `fit`, which must not overwrite an earlier run.
        config_files: The config files; the first one names the default run folder.
        ckpt_path: The checkpoint to load, `last`, or `None`.

    Returns:
        The checkpoint's path; `None` if there is none to load.

    Raises:
        UserError: If the run folder holds another run, the checkpoint is missing or damaged, or the strategy cannot be
            used.
    """
    root = Path(config["default_root_dir"] or default_run_folder(config_files))
    config["default_root_dir"] = str(root)
    if config["logger"] in (None, True):
        config["logger"] = TensorBoardLogger(root, name="", version="")
    if config["max_epochs"] is None and config["max_steps"] == -1 and config["max_time"] is None:
        config["max_epochs"] = 1
    check_name(config["strategy"])
    config["callbacks"] = with_default_callbacks(
        config["callbacks"],
        progress_bar=config["enable_progress_bar"] is not False,
        checkpoints=config["enable_checkpointing"] is not False,
    )
    folders = set_folders(config["callbacks"], root / "checkpoints")
    if trains and not config["fast_dev_run"]:
        check_run_folder(root, folders, ckpt_path)
        if getattr(rank_zero_only, "rank", 0) == 0 and not int(os.environ.get("NODE_RANK", 0)):
            lock_run_folder(root)
    return checkpoint_to_load(folders, ckpt_path)


def complete_trainer(trainer: Trainer, precision: Any) -> None:
    """Give a new trainer our checkpoint files, and check that it computes in the precision that was asked for.

    Args:
        trainer: The trainer.
        precision: `trainer.precision` as configured.

    Raises:
        UserError: If Lightning replaced float16 by bfloat16, as it does on a CPU.
    """
    if str(precision) in ("16", "16-mixed") and trainer.precision != "16-mixed":
        raise UserError(
            f"trainer.precision: {precision} scales the loss for float16, which requires a GPU; use bf16-mixed or "
            "32-true on this machine"
        )
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()


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
        observers.LastCheckpoint(),
        observers.HyperParameters(),
        observers.DataSummary(),
        observers.CheckSummary(),
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
