"""When the checks of a run are made: Lightning's hooks, passed on to each check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, Trainer

from sft_lightning.compat.lightning.loops import call_after_training
from sft_lightning.training.checks.data.coverage import Coverage
from sft_lightning.training.checks.data.masks import Masks
from sft_lightning.training.checks.data.rows import RowsAsPlanned
from sft_lightning.training.checks.data.stores import FoundStores
from sft_lightning.training.checks.export import ExportedFolders
from sft_lightning.training.checks.hooks import RunCheck, values_of_processes
from sft_lightning.training.checks.model.forward_pass import ForwardPass
from sft_lightning.training.checks.model.modes import Modes
from sft_lightning.training.checks.model.processes import SameWeights
from sft_lightning.training.checks.model.storage import Storage
from sft_lightning.training.checks.model.validation import ValidationWeight
from sft_lightning.training.checks.update.gradient import FirstGradient
from sft_lightning.training.checks.update.movement import FirstUpdate
from sft_lightning.training.checks.update.optimizer import LearningRate, OptimizerGroups
from sft_lightning.training.preference.reference_checks import ReferenceModel

CHECKS: tuple[type[RunCheck], ...] = (
    Storage,
    Modes,
    FoundStores,
    Coverage,
    Masks,
    ForwardPass,
    RowsAsPlanned,
    ValidationWeight,
    SameWeights,
    OptimizerGroups,
    LearningRate,
    FirstUpdate,
    ReferenceModel,
    ExportedFolders,
    FirstGradient,  # last, because the next forward pass of the module is then that of the training step
)
"""The checks of a training run, in the order in which they are made; each is in a module beside this one."""


class RunChecks(Callback):
    """Make the checks of a training run. The module brings it with it, so that no configuration is without it."""

    def __init__(self) -> None:
        self._checks = [check() for check in CHECKS]

    def _of(self, trainer: Trainer) -> Iterator[RunCheck]:
        """Yield the checks if the run trains; `validate` and `test` have none."""
        if trainer.state.fn == "fit":
            yield from self._checks

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        pl_module.checks.exchange = values_of_processes
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            call_after_training(trainer, lambda: self._after_training(trainer, pl_module))

    def _after_training(self, trainer: Trainer, module: Any) -> None:
        """Make the checks of what the run left; a later run of the same trainer has checks of its own."""
        if self in trainer.callbacks:  # type: ignore[attr-defined]
            for check in self._of(trainer):
                check.after_training(module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        for check in self._of(trainer):
            check.on_load_checkpoint(pl_module, checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        for check in self._of(trainer):
            check.on_fit_start(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        for check in self._of(trainer):
            check.on_train_start(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for check in self._of(trainer):
            check.on_train_batch_start(pl_module, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        for check in self._of(trainer):
            check.on_before_optimizer_step(pl_module, optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for check in self._of(trainer):
            check.on_train_batch_end(pl_module, batch, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        for check in self._of(trainer):
            check.on_validation_start(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        for check in self._of(trainer):
            check.on_validation_batch_end(pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        for check in self._of(trainer):
            check.on_validation_end(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        for check in self._of(trainer):
            check.on_train_epoch_end(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        for check in self._of(trainer):
            check.on_train_end(pl_module)
