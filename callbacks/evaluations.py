"""When a run validates: before training, every few optimizer steps or epochs, and after the last step."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from sft_lightning.compat.lightning.loops import is_accumulating, validate_before_training
from sft_lightning.compat.lightning.schedules import is_last_of_epoch, is_last_of_run, validate_when
from sft_lightning.errors import UserError
from sft_lightning.training.checkpoint.state import random_state, set_random_state
from sft_lightning.training.startup import datamodule_of


class EvaluateFirst(Callback):
    """Validate once before the first optimizer step, and log `val/*` at step 0.

    Not a default callback: add it to `trainer.callbacks`. It restores the random state, so that training is the same to
    the bit with and without it. A continued run does not validate again. `EarlyStopping` counts this validation.

    Raises:
        UserError: If there is no validation data, or validation is turned off.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        require_validation(trainer, "callbacks.EvaluateFirst")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step:
            return
        state = random_state()
        validate_before_training(trainer)
        set_random_state(state)


class EvaluateEvery(Callback):
    """Validate every few optimizer steps or epochs, and always after the last optimizer step of the run.

    Not a default callback: add it to `trainer.callbacks`. It replaces the trainer's schedule, which counts
    micro-batches and so drifts where `accumulate_grad_batches` does not divide the micro-batches of an epoch.

    Args:
        every_n_steps: Optimizer steps between two validations, as `eval_steps` in transformers.
        every_n_epochs: Epochs between two validations. With neither, the run validates after its last step only.

    Raises:
        UserError: If a number is below 1, both are set, the trainer has its own schedule, there is no validation data,
            or validation is turned off.
    """

    def __init__(self, every_n_steps: int | None = None, every_n_epochs: int | None = None) -> None:
        for name, number in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
            if number is not None and number < 1:
                raise UserError(f"callbacks.EvaluateEvery: {name} must be at least 1 (got {number})")
        if every_n_steps and every_n_epochs:
            raise UserError("callbacks.EvaluateEvery: set every_n_steps or every_n_epochs, not both")
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        require_validation(trainer, "callbacks.EvaluateEvery")
        if trainer.val_check_interval != 1.0 or trainer.check_val_every_n_epoch != 1:
            raise UserError(
                "callbacks.EvaluateEvery: cannot be combined with trainer.val_check_interval or "
                "trainer.check_val_every_n_epoch; remove them"
            )
        validate_when(trainer, lambda: self._is_due(trainer))

    def _is_due(self, trainer: Trainer) -> bool:
        if is_accumulating(trainer):
            return False
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            return True
        if self.every_n_epochs and is_last_of_epoch(trainer) and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            return True
        return is_last_of_run(trainer)


def require_validation(trainer: Trainer, callback: str) -> None:
    """Check that a run validates.

    Args:
        trainer: The run's trainer.
        callback: What requires it, for the message.

    Raises:
        UserError: If there is no validation data, or validation is turned off.
    """
    if not datamodule_of(trainer).source_names("val"):
        raise UserError(f"{callback}: requires validation data; set data.val_sources or data.val_fraction")
    if not trainer.limit_val_batches:
        raise UserError(
            f"{callback}: cannot be combined with trainer.limit_val_batches: 0, which turns validation off; remove one "
            "of the two"
        )
