"""Check that the gradient of an optimizer step does not depend on how its rows are split and packed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sft_lightning.checks import Check, within
from sft_lightning.data.plan.epoch_plan import Packing
from sft_lightning.models.inspection import base_model
from sft_lightning.selftest.short_runs import Run, Runner
from sft_lightning.selftest.small_data import SmallData
from sft_lightning.training.module import CausalLMModule

_SPLITS = (1, 2, 4)
"""Rows per micro-batch of the splits that are compared."""

_ENTRIES = 1 << 16
"""Most entries of a tensor that are compared; those of a larger one are evenly spaced."""

_FLOAT32_TOLERANCE = 1e-4
_ROUNDINGS = 8
"""Tolerance in rounding errors of the run's coarsest type: sums in another order differ by rounding."""


@dataclass
class Gradient:
    """A gradient, or at most 65,536 evenly spaced entries of each tensor."""

    entries: list[torch.Tensor] = field(default_factory=list)
    """Entries of each parameter, (n,) float32 on the CPU."""

    def difference(self, other: Gradient) -> float:
        """Return the norm of the difference, relative to the norm of this gradient; infinite if that is zero."""
        norm = math.sqrt(sum(float(mine.double().square().sum()) for mine in self.entries))
        pairs = zip(self.entries, other.entries, strict=True)
        apart = math.sqrt(sum(float((mine.double() - theirs.double()).square().sum()) for mine, theirs in pairs))
        return apart / norm if norm else math.inf


class GradientRecorder(torch.optim.Optimizer):
    """An optimizer that records the gradient and changes no weight.

    Args:
        params: Parameters, or groups of them.
        gradient: Filled at every step.
    """

    def __init__(self, params: Any, gradient: Gradient) -> None:
        super().__init__(params, {"lr": 0.0})
        self._gradient = gradient

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # one form
        """Run the closure and record the gradient."""
        loss = closure() if closure is not None else None
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._gradient.entries = [_sampled(parameter) for parameter in parameters]
        return loss


def _sampled(parameter: torch.Tensor) -> torch.Tensor:
    values = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    stride = max(1, math.ceil(values.numel() / _ENTRIES))
    return values.detach().flatten()[::stride].float().cpu()


def disable_randomness(module: CausalLMModule) -> None:
    """Make a loaded model deterministic: no dropout, no router jitter, and no auxiliary loss of the routers."""
    for layer in module.language_model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
        for name, value in vars(layer).items():
            if isinstance(value, float) and any(word in name for word in ("dropout", "jitter", "layerdrop")):
                setattr(layer, name, 0.0)
    config: Any = base_model(module.language_model).config
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # it depends on the micro-batch, not only on the step


class GradientSession:
    """Computes gradients of the same weights on the same examples; the model is loaded once.

    Args:
        runner: Runs the configuration.
        small: The examples.
    """

    def __init__(self, runner: Runner, small: SmallData) -> None:
        self._runner = runner
        self._small = small
        self.run: Run | None = None
        """The latest run."""

    def gradient(self, batch_size: int, packing: Packing) -> tuple[Gradient, int]:
        """Return the gradient of one optimizer step over all rows, and its number of micro-batches.

        Args:
            batch_size: Rows per micro-batch.
            packing: `data.packing`.
        """
        accumulate = math.ceil(self._small.num_rows(packing) / batch_size)
        module = self.run.module if self.run is not None else self._load()
        gradient = Gradient()

        def record(params: Any) -> GradientRecorder:
            disable_randomness(module)
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
        """The latest run, whose model is loaded."""
        if self.run is None:
            raise RuntimeError("the session has not computed a gradient yet")
        return self.run

    @property
    def tolerance(self) -> float:
        """Largest relative difference between two gradients of the same examples."""
        return max(_FLOAT32_TOLERANCE, _ROUNDINGS * self.loaded.rounding)

    def _load(self) -> CausalLMModule:
        module = self._runner.configured_module()
        module.spec = replace(module.spec, neftune_alpha=None)  # before the model is built with a hook for it
        return module


def check_gradients(session: GradientSession, packing: Packing) -> Iterator[Check]:
    """Compare the gradients of one optimizer step that is split into micro-batches in three ways.

    Args:
        session: Computes the gradients.
        packing: `data.packing` of the configuration.
    """
    first, accumulate = session.gradient(_SPLITS[0], packing)
    reference = f"{_SPLITS[0]} × {accumulate}"
    for batch_size in _SPLITS[1:]:
        other, accumulate = session.gradient(batch_size, packing)
        what = f"compared with {reference} (batch × accumulation): relative difference"
        yield within(f"gradient {batch_size} × {accumulate}", first.difference(other), session.tolerance, what)


def check_packed_gradient(session: GradientSession, separate: Gradient) -> Check:
    """Compare the gradient of packed rows with that of one example per row.

    Args:
        session: Computes the gradients.
        separate: The gradient with one example per row.
    """
    packed, _ = session.gradient(1, "best_fit")
    what = "compared with one example per row: relative difference"
    return within("gradient packed", separate.difference(packed), session.tolerance, what)
