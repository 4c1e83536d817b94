"""Every trained tensor has a gradient and is moved by the first update with a learning rate above 0."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sft_lightning.checks import Check
from sft_lightning.compat.lightning.loops import is_accumulating
from sft_lightning.models.inspection import is_sharded
from sft_lightning.strategies.services import services_of
from sft_lightning.training.checks.hooks import RunCheck, is_logging_point

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from sft_lightning.training.module import CausalLMModule

_NAME = "first update"
_SAFETY = 1e-3
"""A tensor must move if its rate times its gradient (at most 1) times this is more than its rounding error."""


class Entries(NamedTuple):
    """The entry of each trained tensor with the largest gradient."""

    names: list[str]
    """Names of the tensors."""

    places: list[torch.Tensor]
    """Where it is in the flattened tensor, int64 scalars on the device."""

    gradients: torch.Tensor
    """Its absolute gradient, float32 (N,)."""

    values: torch.Tensor
    """Its value, float32 (N,)."""


class FirstUpdate(RunCheck):
    """Check the first update with a learning rate above 0; noted when a step is logged."""

    def __init__(self) -> None:
        self._before: Entries | None = None
        self._after: torch.Tensor | None = None
        self._rate = 0.0
        self._done = False

    def on_train_start(self, module: CausalLMModule) -> None:
        """Say why the update cannot be looked at."""
        if is_sharded(module.language_model) or services_of(module.trainer.strategy).manages_gradients:
            module.checks.note(Check(_NAME, None, "no process has whole gradients"))
            self._done = True

    def on_before_optimizer_step(self, module: CausalLMModule, optimizer: Optimizer) -> None:
        """Note an entry of each tensor before the update, on the device."""
        if self._done or self._before is not None:
            return
        self._rate = min(float(group["lr"]) for group in optimizer.param_groups)
        if self._rate > 0:
            self._before = largest_entries(module.language_model)

    def on_train_batch_end(self, module: CausalLMModule, batch: Any, index: int) -> None:
        """Note the same entries after the update; compare them when the next step is logged."""
        if self._done or self._before is None or is_accumulating(module.trainer):
            return
        if self._after is None:
            self._after = _values(module.language_model, self._before)
        if is_logging_point(module):
            self._note(module)

    def on_train_end(self, module: CausalLMModule) -> None:
        """Compare what no logged step came after."""
        if self._done:
            return
        if self._before is None or self._after is None:
            module.checks.note(Check(_NAME, None, "no step was taken with a learning rate above 0"))
        else:
            self._note(module)

    def _note(self, module: CausalLMModule) -> None:
        before, after = self._before, self._after
        if before is None or after is None:
            return
        config = module.base_model.config.get_text_config()
        types = {name: each.dtype for name, each in module.language_model.named_parameters()}
        check = module.checks.run(
            lambda: check_update(before, after, self._rate, types, irregular=skips_layers(config))
        )
        self._before = self._after = None
        self._done = check.passed is not None  # else again at the next step


def largest_entries(model: torch.nn.Module) -> Entries | None:
    """Return the entry with the largest gradient of each tensor that trains; `None` if none trains.

    Args:
        model: The model, with the gradients of a step.
    """
    names, places, gradients, values = [], [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            flat = parameter.detach().reshape(-1)
            gradient = torch.zeros_like(flat) if parameter.grad is None else parameter.grad.detach().reshape(-1).abs()
            place = gradient.argmax()
            names.append(name)
            places.append(place)
            gradients.append(gradient[place].float())
            values.append(flat[place].float())
    return Entries(names, places, torch.stack(gradients), torch.stack(values)) if names else None


def _values(model: torch.nn.Module, entries: Entries) -> torch.Tensor:
    named = dict(model.named_parameters())
    pairs = zip(entries.names, entries.places, strict=True)
    return torch.stack([named[name].detach().reshape(-1)[place].float() for name, place in pairs])


def check_update(
    before: Entries, after: torch.Tensor, rate: float, types: Mapping[str, torch.dtype], *, irregular: bool = False
) -> Check:
    """Check that an update moved every tensor, and that no layer was left without a gradient.

    With LoRA's B at zero, the gradient of A is zero: a layer is frozen only if none of its tensors has a gradient.

    Args:
        before: An entry of each tensor before the update.
        after: The same entries after it, (N,).
        rate: The smallest learning rate of a group.
        types: The type of each tensor.
        irregular: Whether the model may leave out layers.

    Returns:
        A check; it does not apply if no tensor has a gradient, or one is not finite.
    """
    rows = list(zip(before.names, before.gradients.tolist(), before.values.tolist(), after.tolist(), strict=True))
    if not bool(torch.isfinite(before.gradients).all()) or not any(gradient for _, gradient, _, _ in rows):
        return Check(_NAME, None, "the gradients of the step are zero or not finite")
    frozen = [] if irregular else layers_without_gradient({name: gradient for name, gradient, _, _ in rows})
    if frozen:
        return Check(_NAME, False, f"{len(frozen)} layers have no gradient, unlike others of their kind: {frozen[0]} …")
    unmoved = [
        name
        for name, gradient, old, new in rows
        if old == new and _must_move(rate * min(1.0, gradient), old, torch.finfo(types[name]).eps)
    ]
    if unmoved:
        return Check(_NAME, False, f"{len(unmoved)} tensors have a gradient and were not updated: {unmoved[0]} …")
    moved = sum(old != new for _, _, old, new in rows)
    waiting = sum(not gradient for _, gradient, _, _ in rows)
    figure = f"{moved} of {len(rows)} trained tensors moved; {waiting} have no gradient yet, in no layer all of them"
    return Check(_NAME, True, figure)


def _must_move(step: float, value: float, rounding: float) -> bool:
    """Whether an update of about this size changes a value; it is lost in the rounding of a much larger one."""
    return step > 1e-30 if value == 0 else step * _SAFETY > rounding * abs(value)


def layers_without_gradient(gradients: Mapping[str, float]) -> list[str]:
    """Return the layers whose tensors all have a zero gradient while another layer of their kind has one.

    Experts may get no token of a step, and parts that the text does not reach, such as a vision tower, none at all.

    Args:
        gradients: The largest absolute gradient of each tensor, by name.
    """
    layers: dict[str, bool] = {}
    for name, gradient in gradients.items():
        layer = re.sub(r"\.default\b.*", "", name).rpartition(".")[0]
        layers[layer] = layers.get(layer, False) or gradient > 0
    trains = {_kind(layer) for layer, moves in layers.items() if moves}
    return [layer for layer, moves in layers.items() if not moves and _kind(layer) in trains and "expert" not in layer]


def _kind(layer: str) -> str:
    """Return a layer's name without its number."""
    return re.sub(r"\.\d+\b", ".N", layer)


def skips_layers(config: Any) -> bool:
    """Whether a model may leave out layers, or shares keys and values between some.

    Args:
        config: The configuration of the decoder.
    """
    return bool(getattr(config, "layerdrop", 0) or getattr(config, "num_kv_shared_layers", 0))
