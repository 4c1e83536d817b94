"""Lightning's schedules: when a checkpoint callback saves, and when the training loop validates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sft_lightning.compat.names import uses

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

_SAVER = "lightning.pytorch.callbacks.model_checkpoint:ModelCheckpoint"


@uses(
    f"{_SAVER}._should_save_on_train_epoch_end",
    attributes=("_save_on_train_epoch_end", "_enable_version_counter"),
    feature="checkpoints at the end of each epoch",
    since="2.0",
    replacement="`save_on_train_epoch_end: true` and `enable_version_counter: false` of each ModelCheckpoint",
)
def save_when_training(callback: ModelCheckpoint) -> None:
    """Save at the steps and epochs that a callback names, not at the validation that follows them.

    With `trainer.val_check_interval`, Lightning saves the epoch at a validation within it, and puts a save at the last
    batch of an epoch off. A file of the same step, which a killed run left, is written again instead of under another
    name.

    Args:
        callback: A callback without a metric to monitor; what the user has set on it stays.
    """
    if callback._save_on_train_epoch_end is None:
        callback._save_on_train_epoch_end = True
    if "{step" in (callback.filename or ""):
        callback._enable_version_counter = False


@uses(
    f"{_SAVER}._should_skip_saving_checkpoint",
    attributes=("_every_n_train_steps", "_last_global_step_saved"),
    feature="fit --ckpt_path with a ModelCheckpoint that counts steps",
    since="2.0",
    replacement="not needed once Lightning keeps `_last_global_step_saved` in the callback's state",
)
def note_continued_step(callback: ModelCheckpoint, step: int) -> None:
    """Save no second checkpoint of the step that a run continues from, while it accumulates the next one.

    Args:
        callback: A callback; one that does not count steps stays as it is.
        step: Optimizer steps done.
    """
    if callback._every_n_train_steps:
        callback._last_global_step_saved = step


@uses(
    f"{_SAVER}._save_topk_checkpoint",
    f"{_SAVER}._save_last_checkpoint",
    f"{_SAVER}._monitor_candidates",
    f"{_SAVER}._should_skip_saving_checkpoint",
    feature="a checkpoint after the last optimizer step",
    since="2.0",
    replacement="`trainer.save_checkpoint` to `last.ckpt`, which `save_top_k` does not count",
)
def save_now(callback: ModelCheckpoint, trainer: Trainer, *, only_last: bool) -> None:
    """Save as a callback does, unless it has already saved this step.

    Args:
        callback: The callback.
        trainer: The trainer.
        only_last: Write `last.ckpt` only, because no metric of this step decides on another file.
    """
    if callback._should_skip_saving_checkpoint(trainer):
        return
    candidates: dict[str, Any] = callback._monitor_candidates(trainer)
    if not only_last:
        callback._save_topk_checkpoint(trainer, candidates)
    callback._save_last_checkpoint(trainer, candidates)


@uses(
    "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop._should_check_val_fx",
    attributes=("fit_loop.epoch_loop",),
    feature="callbacks.EvaluateEvery",
    since="2.1",
    replacement="`trainer.val_check_interval`, which counts micro-batches",
)
def validate_when(trainer: Trainer, is_due: Callable[[], bool]) -> None:
    """Patch the training loop of one trainer: it validates after the micro-batches for which `is_due` is true.

    Args:
        trainer: The trainer; without validation data it never validates.
        is_due: Called after each micro-batch, on every rank; the answers must agree.
    """

    def should_check(data_fetcher: Any) -> bool:
        return trainer.enable_validation and is_due()

    trainer.fit_loop.epoch_loop._should_check_val_fx = should_check  # type: ignore[method-assign]


@uses(
    "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop._num_ready_batches_reached",
    attributes=("fit_loop.epoch_loop",),
    feature="callbacks.EvaluateEvery",
    since="2.0",
    replacement="`epoch_loop.batch_progress.is_last_batch`",
)
def is_last_of_epoch(trainer: Trainer) -> bool:
    """Whether the micro-batch that has just run is the last one of its epoch."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


@uses(
    "lightning.pytorch.loops.fit_loop:_FitLoop._can_stop_early",
    feature="callbacks.EvaluateEvery",
    since="2.0",
    replacement="`trainer.min_steps` and `trainer.min_epochs`",
)
def is_last_of_run(trainer: Trainer) -> bool:
    """Whether the optimizer step that has just ended is the last one of the run."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    if trainer.should_stop and trainer.fit_loop._can_stop_early:
        return True
    epochs = trainer.max_epochs
    return is_last_of_epoch(trainer) and epochs not in (None, -1) and trainer.current_epoch + 1 >= int(epochs or 0)
