"""Lightning's loops: which micro-batch ends an optimizer step, where a continued run stands, what step is logged."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from sft_lightning.compat.names import uses

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import LightningModule, Trainer

_LOOPS = "lightning.pytorch.loops"


@uses(
    f"{_LOOPS}.fit_loop:_FitLoop._should_accumulate",
    feature="fit",
    since="2.0",
    replacement="the same from `epoch_loop.batch_progress`, `accumulate_grad_batches` and `num_training_batches`",
)
def is_accumulating(trainer: Trainer) -> bool:
    """Whether the micro-batch that has just run leaves its optimizer step unfinished."""
    return bool(trainer.fit_loop._should_accumulate())


@uses(
    f"{_LOOPS}.training_epoch_loop:_TrainingEpochLoop._broadcast_sigterm_tensor",
    attributes=("fit_loop.epoch_loop",),
    feature="fit in several processes without waiting for a GPU at each micro-batch",
    since="2.6",
    replacement="not needed once Lightning asks less often (Lightning#21487); until then, it waits at each micro-batch",
    optional=True,
)
def stop_asking_for_signals(trainer: Trainer) -> None:
    """Patch the training loop of one trainer: it no longer asks all processes for SIGTERM before each micro-batch.

    The answer is always no, because Lightning's handler of the signal is not installed where ours is.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


@uses(
    f"{_LOOPS}.training_epoch_loop:_TrainingEpochLoop.on_save_checkpoint",
    attributes=("fit_loop.epoch_loop._batches_that_stepped",),
    feature="fit --ckpt_path",
    since="2.0",
    replacement="logging `step` with every metric, which Lightning takes for the x axis",
)
def set_logged_step(trainer: Trainer) -> None:
    """Set the step that loggers show to the number of optimizer steps; Lightning derives it from other counters."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


@uses(
    f"{_LOOPS}.evaluation_loop:_EvaluationLoop.run",
    attributes=("_logger_connector._first_loop_iter", "fit_loop.epoch_loop.val_loop"),
    feature="callbacks.EvaluateFirst",
    since="2.1",
    replacement="`trainer.validate` before `trainer.fit`",
)
def validate_before_training(trainer: Trainer) -> None:
    """Run the validation loop in `on_train_start`, as Lightning does between two training batches.

    See `_TrainingEpochLoop.on_advance_end`.
    """
    connector = trainer._logger_connector
    first = connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first


@uses(
    f"{_LOOPS}.fit_loop:_FitLoop.run",
    attributes=("fit_loop",),
    feature="exports of a run that is continued with nothing left to train",
    since="2.0",
    replacement="`on_train_end`, which Lightning calls only if there is something left to train",
)
def call_after_training(trainer: Trainer, function: Callable[[], None]) -> None:
    """Patch the training loop of one trainer: a function runs after it, also if nothing was left to train.

    `on_fit_end` would come too late: the strategy has then given up its devices.

    Args:
        trainer: The trainer.
        function: Runs on every rank; not after an error.
    """
    loop = trainer.fit_loop
    run = loop.run

    def run_and_call() -> None:
        run()
        function()

    loop.run = run_and_call  # type: ignore[method-assign]


@uses(
    f"{_LOOPS}.progress:_ProcessedTracker.ready",
    feature="fit --ckpt_path within an optimizer step",
    since="2.0",
    replacement="checkpoints at the end of optimizer steps only",
)
def align_progress(fit_loop: dict[str, Any], micro_batches: int) -> None:
    """Set Lightning's counters of the epoch, in a checkpoint's `loops["fit_loop"]`, to `micro_batches`.

    Lightning counts micro-batches; a checkpoint may fall between two of one optimizer step (whose gradients it does not
    hold), or come from a run that split the same global batch in another way. What counts is the optimizer step.
    Counters that already agree stay as they are.

    Args:
        fit_loop: The part of the checkpoint, changed in place.
        micro_batches: Micro-batches of the epoch before the optimizer step that comes next.
    """
    progress = fit_loop["epoch_loop.batch_progress"]
    if progress["current"]["ready"] == micro_batches:
        return
    for counter, current in progress["current"].items():
        progress["total"][counter] += micro_batches - current
        progress["current"][counter] = micro_batches


@uses(
    f"{_LOOPS}.progress:_BatchProgress.is_last_batch",
    feature="fit --ckpt_path within an epoch",
    since="2.0",
    replacement="checkpoints at the end of epochs only",
)
def reopen_epoch(fit_loop: dict[str, Any], epoch: int) -> None:
    """Mark an epoch as unfinished, in a checkpoint's `loops["fit_loop"]`.

    A run that reaches `max_steps` within an epoch ends the epoch, as far as Lightning is concerned; continued with more
    steps, it would skip the epoch's other rows. So it would if the epoch has become longer, as a stream's does.

    Args:
        fit_loop: The part of the checkpoint, changed in place.
        epoch: The epoch to finish, from 0.
    """
    fit_loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    progress = fit_loop["epoch_progress"]
    for counter in ("processed", "completed"):
        ahead = max(0, progress["current"][counter] - epoch)
        progress["total"][counter] -= ahead
        progress["current"][counter] -= ahead


@uses(
    "lightning.fabric.utilities.device_dtype_mixin:_DeviceDtypeModuleMixin.device",
    attributes=("_device",),
    feature="trainer.strategy: fsdp2_offload",
    since="2.0",
    replacement="a setter of `LightningModule.device`",
)
def set_device(module: LightningModule, device: torch.device) -> None:
    """Set the device that a module computes on, although its parameters are stored on another.

    Args:
        module: No parameter is moved.
        device: What `module.device` is from now on.
    """
    module._device = device


@uses(
    "lightning.pytorch.core.optimizer:LightningOptimizer.optimizer",
    feature="saving the optimizer's state",
    since="2.0",
    replacement="not needed once Lightning exports the class; its property `optimizer` is documented",
)
def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer itself, without the wrapper that Lightning hands out."""
    wrapper = importlib.import_module("lightning.pytorch.core.optimizer").LightningOptimizer
    return cast("torch.optim.Optimizer", optimizer.optimizer if isinstance(optimizer, wrapper) else optimizer)
