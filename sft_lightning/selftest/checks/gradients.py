"""Whether one optimizer step's gradient is the same however its rows are dealt out and packed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sft_lightning.data.plan.epoch_plan import Packing
from sft_lightning.models.inspection import base_model
from sft_lightning.selftest.checks import Check, within
from sft_lightning.selftest.short_runs import Run, Runner
from sft_lightning.selftest.small_data import SmallData
from sft_lightning.training.module import CausalLMModule

_SPLITS = (1, 2, 4)
_ENTRIES = 1 << 16
_FLOAT32_TOLERANCE = 1e-4
_ROUNDINGS = 8
"""Rounding errors of the coarsest type that two orders of summation may be apart, in the norm of the gradient."""


@dataclass
class Gradient:
    """A gradient, at most some ten thousand evenly spaced entries of each tensor."""

    entries: list[torch.Tensor] = field(default_factory=list)
    """Float32, on the CPU."""

    def difference(self, other: Gradient) -> float:
        """Return the norm of the difference over the norm of this gradient; infinite if this is zero."""
        norm = math.sqrt(sum(float(mine.double().square().sum()) for mine in self.entries))
        pairs = zip(self.entries, other.entries, strict=True)
        apart = math.sqrt(sum(float((mine.double() - theirs.double()).square().sum()) for mine, theirs in pairs))
        return apart / norm if norm else math.inf


class GradientRecorder(torch.optim.Optimizer):
    """Takes no step, and keeps the gradient that it was given.

    Args:
        params: As of any optimizer.
        gradient: Filled at every step.
    """

    def __init__(self, params: Any, gradient: Gradient) -> None:
        super().__init__(params, {"lr": 0.0})
        self._gradient = gradient

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # one form
        """Run the closure, and record."""
        loss = closure() if closure is not None else None
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._gradient.entries = [_sampled(parameter) for parameter in parameters]
        return loss


def _sampled(parameter: torch.Tensor) -> torch.Tensor:
    values = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    stride = max(1, values.numel() // _ENTRIES)
    return values.detach().flatten()[::stride].float().cpu()


def switch_off_chance(module: CausalLMModule) -> None:
    """Make a loaded model a function of its input: no dropout, no noise, no loss of the routers' own."""
    for layer in module.language_model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
        for name, value in vars(layer).items():
            if isinstance(value, float) and any(word in name for word in ("dropout", "jitter", "layerdrop")):
                setattr(layer, name, 0.0)
    config: Any = base_model(module.language_model).config
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # the balance of a micro-batch is not the balance of a step


class GradientSession:
    """Gradients of the same weights on the same examples.

    Args:
        runner: Makes the runs.
        small: The examples.
    """

    def __init__(self, runner: Runner, small: SmallData) -> None:
        self._runner = runner
        self._small = small
        self.run: Run | None = None
        """The last run; its model is loaded once for all of them."""

    def gradient(self, batch_size: int, packing: Packing) -> tuple[Gradient, int]:
        """Return the gradient of one step over all rows, and the number of its micro-batches."""
        accumulate = math.ceil(self._small.num_rows(packing) / batch_size)
        module = self.run.module if self.run is not None else self._load()
        gradient = Gradient()

        def record(params: Any) -> GradientRecorder:
            switch_off_chance(module)
            return GradientRecorder(params, gradient)

        module.spec = replace(module.spec, optimizer=record)
        self.run = self._runner.fit(
            self._small.module(batch_size=batch_size, packing=packing),
            max_steps=1,
            accumulate=accumulate,
            module=module,
            trainer={"gradient_clip_val": None},
        )
        return gradient, accumulate

    @property
    def loaded(self) -> Run:
        """The last run."""
        if self.run is None:
            raise RuntimeError("the session has not computed a gradient yet")
        return self.run

    @property
    def tolerance(self) -> float:
        """How far two gradients of the same examples may be apart, relative to their norm."""
        return max(_FLOAT32_TOLERANCE, _ROUNDINGS * self.loaded.rounding)

    def _load(self) -> CausalLMModule:
        module = self._runner.module()
        module.spec = replace(module.spec, neftune_alpha=None)  # before the model is made, which would get its hook
        return module


def check_gradients(session: GradientSession, packing: Packing) -> Iterator[Check]:
    """Compare the gradients of three ways to split one optimizer step.

    Args:
        session: Of the loaded model.
        packing: The configuration's.
    """
    first, accumulate = session.gradient(_SPLITS[0], packing)
    reference = f"{_SPLITS[0]} × {accumulate}"
    for batch_size in _SPLITS[1:]:
        other, accumulate = session.gradient(batch_size, packing)
        what = f"against {reference} (batch × accumulation): relative difference"
        yield within(f"gradient {batch_size} × {accumulate}", first.difference(other), session.tolerance, what)


def check_packed_gradient(session: GradientSession, separate: Gradient) -> Check:
    """Compare the gradient of packed rows with that of one example a row.

    Args:
        session: Of the loaded model.
        separate: The gradient of one example a row.
    """
    packed, _ = session.gradient(1, "best_fit")
    what = "against one example a row: relative difference"
    return within("gradient packed", separate.difference(packed), session.tolerance, what)
