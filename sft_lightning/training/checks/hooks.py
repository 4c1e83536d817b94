"""What a check of a run is: hooks that the run calls at the moments at which there is something to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from sft_lightning.training.module import CausalLMModule

Value = TypeVar("Value")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RunCheck:
    """A check of a training run, and what it keeps between its hooks; it overrides the hooks that it needs.

    A hook notes its outcomes with `module.checks.run` or `module.checks.note`, which stop the run when a check fails.
    Both exchange the outcome among all processes, so that all of them stop, and wait for the device. Therefore every
    process has to note the same checks in the same hooks, and between the start and the end only at logging points
    (`is_logging_point`). No check may draw from a random generator or leave a gradient.
    """

    def on_load_checkpoint(self, module: CausalLMModule, checkpoint: dict[str, Any]) -> None:
        """Look at the checkpoint that a run continues from, after the model has loaded it.

        Args:
            module: The module of the run.
            checkpoint: The whole checkpoint.
        """

    def on_fit_start(self, module: CausalLMModule) -> None:
        """Look at the loaded model before its layers are recomputed or compiled."""

    def on_train_start(self, module: CausalLMModule) -> None:
        """Look at the model as it trains: set up, restored from a checkpoint, with its optimizer."""

    def on_train_batch_start(self, module: CausalLMModule, batch: Any, index: int) -> None:
        """Look at a micro-batch before it is trained on.

        Args:
            module: The module of the run.
            batch: The micro-batch, on its device.
            index: Its number in the epoch, from 0.
        """

    def on_before_optimizer_step(self, module: CausalLMModule, optimizer: Optimizer) -> None:
        """Look at the accumulated gradients, before they are clipped.

        Args:
            module: The module of the run.
            optimizer: The optimizer that is about to take a step.
        """

    def on_train_batch_end(self, module: CausalLMModule, batch: Any, index: int) -> None:
        """Look at what a micro-batch has changed; the last one of an optimizer step includes the update.

        Args:
            module: The module of the run.
            batch: The micro-batch, on its device.
            index: Its number in the epoch, from 0.
        """

    def on_validation_start(self, module: CausalLMModule) -> None:
        """Look at the model before a validation within the training, the one before the first step included."""

    def on_validation_batch_end(self, module: CausalLMModule, batch: Any, index: int, source: int) -> None:
        """Look at a micro-batch that was validated on.

        Args:
            module: The module of the run.
            batch: The micro-batch, on its device.
            index: Its number among those of its source, from 0.
            source: Number of the source, from 0.
        """

    def on_validation_end(self, module: CausalLMModule) -> None:
        """Look at the model after a validation."""

    def on_train_epoch_end(self, module: CausalLMModule) -> None:
        """Look at the model after an epoch, or after the last step of a run that ends within one."""

    def on_train_end(self, module: CausalLMModule) -> None:
        """Look at what the training has come to; not called when the run fails or is interrupted."""

    def after_training(self, module: CausalLMModule) -> None:
        """Look at what the run left in its folder; called also if nothing was left to train, but not after an error."""


def is_logging_point(module: CausalLMModule) -> bool:
    """Whether the optimizer step that was just completed is logged, so that the device is waited for anyway.

    Args:
        module: The module of the run.
    """
    every: int = getattr(module.trainer, "log_every_n_steps", 0) or 0
    return module.trainer.global_step == 1 or bool(every and module.trainer.global_step % every == 0)


def values_of_processes(value: Value) -> list[Value]:
    """Return the value that each process of the run has, in the order of their ranks; all of them must call this.

    Args:
        value: This process's value; anything that can be pickled.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def coarsest_rounding(module: CausalLMModule) -> float:
    """Return the relative rounding error (machine epsilon) of the coarsest type that a run computes in.

    Args:
        module: The module of the run.
    """
    spec = module.spec
    types = {each.dtype for each in module.language_model.parameters() if each.dtype in _FLOATS}
    types |= {torch.bfloat16} if str(module.trainer.precision).startswith("bf16") else set()
    types |= {torch.float16} if str(module.trainer.precision).startswith("16") else set()
    if spec.quantization is not None:
        types.add(getattr(torch, spec.quantization.compute_dtype or spec.dtype))
    return max(torch.finfo(each).eps for each in types)
