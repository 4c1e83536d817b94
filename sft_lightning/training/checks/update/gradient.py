"""The gradient of the first optimizer step, against one that is computed directly from the definition of the loss.

The definition: the sum of weight · cross entropy over the supervised tokens of the micro-batches, divided by the
supervised weight of the whole step over all ranks. It is computed with the model's own logits and
`torch.nn.functional.cross_entropy`, on the batches that train and with the same random numbers, for one small tensor.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from sft_lightning.checks import Check
from sft_lightning.compat.lightning.loops import is_accumulating
from sft_lightning.models.inspection import has_virtual_tokens, is_sharded
from sft_lightning.strategies.services import services_of
from sft_lightning.training.checks.hooks import RunCheck, coarsest_rounding
from sft_lightning.training.checks.update.direct_gradient import Recorded, direct_gradient, targets_of
from sft_lightning.training.objective import NextToken

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from sft_lightning.training.module import CausalLMModule

_NAME = "first gradient"
_CANDIDATES = 12
"""The smallest of so many trained tensors at the end of the model is compared: the backward pass to it is short."""

_SECONDS = 1.0
"""Further micro-batches are compared while all of them take less; the first one always is."""

_FLOAT32_TOLERANCE = 1e-3
_ROUNDINGS = 8


class FirstGradient(RunCheck):
    """Check the gradient of the first optimizer step that this process takes."""

    def __init__(self) -> None:
        self._hook: Any = None
        self._armed = False
        self._recorded: Recorded | None = None
        self._weight: torch.Tensor | float = 0.0  # of this rank's micro-batches
        self._name = ""
        self._expected: torch.Tensor | None = None  # without the denominator
        self._found: torch.Tensor | None = None
        self._seconds = 0.0  # infinite when no more micro-batches are compared
        self._spent = 0.0
        self._num_compared = 0
        self._reason: str | None = None

    def on_train_start(self, module: CausalLMModule) -> None:
        """Watch the forward passes of the first step, if its gradient can be computed another way."""
        self._reason = reason_not_to(module)
        if self._reason is not None:
            module.checks.note(Check(_NAME, None, self._reason))
            return
        self._hook = module.register_forward_pre_hook(self._record)

    def _record(self, module: Any, inputs: tuple[Any, ...]) -> None:
        """Keep the batch of the training step and the random states that it starts with."""
        if self._armed:
            self._armed = False
            device = module.device
            state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            self._recorded = Recorded(inputs[0], torch.get_rng_state(), state)

    def on_train_batch_start(self, module: CausalLMModule, batch: Any, index: int) -> None:
        """Count the micro-batch's supervised weight; the next forward pass is that of the training step."""
        if self._hook is not None:
            self._weight = self._weight + targets_of(batch)[1].sum()
            self._armed, self._recorded = True, None

    def on_train_batch_end(self, module: CausalLMModule, batch: Any, index: int) -> None:
        """Compute the gradient of a micro-batch before the last of the step."""
        if self._hook is not None and is_accumulating(module.trainer):
            self._add(module)

    def on_before_optimizer_step(self, module: CausalLMModule, optimizer: Optimizer) -> None:
        """Compare what was computed with the gradient that training has accumulated."""
        if self._hook is None:
            return
        if module.trainer.accumulate_grad_batches == 1 or module.trainer.world_size == 1:
            self._add(module)  # else the last backward pass has averaged over the ranks what came before it
        self._hook.remove()
        self._hook = None
        averaged = module.trainer.accumulate_grad_batches == 1
        start = time.perf_counter()
        check = self._compare(module, averaged=averaged)
        module.checks.note(replace(check, seconds=self._spent + time.perf_counter() - start))
        self._recorded = self._expected = self._found = None

    def _add(self, module: CausalLMModule) -> None:
        """Add a micro-batch's gradient, and note the one of training after it, while there is time."""
        recorded, self._recorded = self._recorded, None
        skipped = self._num_compared and self._seconds * (1 + 1 / self._num_compared) > _SECONDS
        if recorded is None or skipped or self._reason is not None:
            self._seconds = float("inf")  # later micro-batches would be compared with a gradient that includes this one
            return
        start = time.perf_counter()
        named = dict(module.language_model.named_parameters())
        self._name = self._name or smallest_late(named)
        if not self._name:
            self._reason = "the first micro-batch leaves no gradient"
            return
        parameter = named[self._name]
        try:
            gradient = direct_gradient(module, recorded, parameter)
        except torch.OutOfMemoryError:  # training fits, and goes on
            gradient = None
        if gradient is None:
            self._reason = "the logits of the first micro-batch's supervised tokens would need too much memory"
            return
        self._expected = gradient if self._expected is None else self._expected + gradient
        self._found = None if parameter.grad is None else parameter.grad.detach().float().clone()
        self._num_compared += 1
        self._spent += time.perf_counter() - start
        self._seconds = self._spent

    def _compare(self, module: CausalLMModule, *, averaged: bool) -> Check:
        strategy, world_size = module.trainer.strategy, module.trainer.world_size
        weight: Any = strategy.reduce(torch.as_tensor(self._weight, device=module.device).double(), reduce_op="sum")
        cannot = self._reason is not None or self._expected is None or self._found is None
        if averaged and world_size > 1:  # one process that cannot keeps the others from waiting for its gradient
            cannot = bool(strategy.reduce(torch.tensor(float(cannot), device=module.device), reduce_op="sum"))
        if cannot or self._expected is None or self._found is None:
            return Check(_NAME, None, self._reason or "a process has no gradient of the first step")
        if averaged and world_size > 1:
            summed: Any = strategy.reduce(self._expected, reduce_op="sum")
            self._expected = summed / world_size
        if not float(weight):
            return Check(_NAME, None, "the first step has no supervised token")
        tolerance = max(_FLOAT32_TOLERANCE, _ROUNDINGS * coarsest_rounding(module))
        # Data-parallel strategies average over ranks; the loss is multiplied by their number for it.
        expected = self._expected * (world_size / float(weight))
        return compare_gradients(expected, self._found, self._name, self._num_compared, tolerance)


def reason_not_to(module: CausalLMModule) -> str | None:
    """Return why the gradient of a run cannot be computed another way; `None` if it can.

    Args:
        module: The module, as it trains.
    """
    model = module.language_model
    if not isinstance(module.objective, NextToken):
        return "for pairs, the reference and the loss at the start are checked"
    if is_sharded(model) or services_of(module.trainer.strategy).manages_gradients:
        return "no process has whole gradients"
    if getattr(module.trainer.precision_plugin, "scaler", None) is not None:
        return "the gradients are scaled (trainer.precision: 16-mixed)"
    if has_virtual_tokens(model):
        return "the adapter adds virtual tokens to each row"
    if getattr(module.base_model.config.get_text_config(), "output_router_logits", False):
        return "the loss includes that of the routers"
    return None


def smallest_late(named: dict[str, torch.nn.Parameter]) -> str:
    """Return the name of the smallest tensor at the end of the model that has a gradient; empty if none has.

    Args:
        named: The model's parameters, in their order.
    """
    late = [name for name, each in named.items() if each.grad is not None][-_CANDIDATES:]
    moving = [name for name in late if bool(named[name].grad.any())]  # type: ignore[union-attr]
    return min(moving, key=lambda name: named[name].numel(), default="")


def compare_gradients(
    expected: torch.Tensor, found: torch.Tensor, name: str, num_compared: int, tolerance: float
) -> Check:
    """Compare two gradients of one tensor.

    Args:
        expected: The gradient by the definition of the loss.
        found: The one that training accumulated, of the same shape.
        name: The tensor.
        num_compared: Micro-batches that both are of.
        tolerance: The largest norm of the difference, relative to that of the expected gradient.
    """
    norm = float(expected.norm())
    if not norm or not bool(torch.isfinite(found).all()):
        return Check(_NAME, None, f"the gradient of {name} is zero or not finite")
    apart = float((found - expected).norm()) / norm
    figure = f"of {name}, {num_compared} micro-batches: relative difference {apart:.1e}"
    if not apart <= tolerance:
        figure += f"; the gradient is {float(found.norm()) / norm:.3g} times as large as by the definition of the loss"
    return Check(_NAME, apart <= tolerance, figure, f"at most {tolerance:.1e}")
