"""Learning-rate schedules, parameter groups, gradient clipping, and checks of the optimizer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sft_lightning.compat.deepspeed import full_shape
from sft_lightning.compat.torch import unscales_in_step
from sft_lightning.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LRScheduleConfig:
    """How the learning rate changes over the planned optimizer steps.

    Raises:
        UserError: If both `warmup_ratio` and `warmup_steps` are set, a value is out of range, or a key does not apply
            to the schedule.
    """

    name: Literal["cosine", "linear", "constant", "polynomial", "wsd", "cosine_with_restarts"] = "cosine"
    """Shape of the decay after warm-up."""

    warmup_ratio: float | None = None
    """Share of all optimizer steps spent warming up linearly from zero."""

    warmup_steps: int | None = None
    """Warm-up in optimizer steps; excludes `warmup_ratio`. With neither, there is no warm-up."""

    min_lr_ratio: float = 0.0
    """Learning rate at the end of the decay, as a share of the peak."""

    power: float | None = None
    """Only with `polynomial`: the exponent of the decay; default 1, which is linear."""

    decay_ratio: float | None = None
    """Only with `wsd`: share of all optimizer steps spent in the decay at the end; default 0.1."""

    num_cycles: int | None = None
    """Only with `cosine_with_restarts`: number of decays from the peak; default 1, which is `cosine`."""

    def __post_init__(self) -> None:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise UserError(
                "model.lr_scheduler: set warmup_ratio or warmup_steps, not both "
                f"(got {self.warmup_ratio} and {self.warmup_steps})"
            )
        for key in ("warmup_ratio", "min_lr_ratio", "decay_ratio"):
            value = getattr(self, key)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"model.lr_scheduler.{key}: must be in [0, 1] (got {value})")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise UserError(f"model.lr_scheduler.warmup_steps: must be at least 0 (got {self.warmup_steps})")
        if self.power is not None and self.power <= 0:
            raise UserError(f"model.lr_scheduler.power: must be above 0 (got {self.power})")
        if self.num_cycles is not None and self.num_cycles < 1:
            raise UserError(f"model.lr_scheduler.num_cycles: must be at least 1 (got {self.num_cycles})")
        for key, name in {"power": "polynomial", "decay_ratio": "wsd", "num_cycles": "cosine_with_restarts"}.items():
            if getattr(self, key) is not None and self.name != name:
                raise UserError(f"model.lr_scheduler.{key}: only valid with name: {name} (got {self.name})")

    def num_warmup_steps(self, num_steps: int) -> int:
        """Return the optimizer steps of the warm-up.

        Args:
            num_steps: Number of planned optimizer steps of the whole run.
        """
        return (self.warmup_steps if self.warmup_ratio is None else math.ceil(self.warmup_ratio * num_steps)) or 0


def lr_factor(config: LRScheduleConfig, step: int, num_steps: int) -> float:
    """Return the factor that the peak learning rate is multiplied by at an optimizer step.

    Warm-up rises linearly from 0 at step 0 to 1 at the end of the warm-up; the decay reaches `min_lr_ratio` at
    `num_steps`. Cosine and its restarts: Loshchilov & Hutter, 2016, arXiv:1608.03983; warmup-stable-decay: Hu et al.,
    2024, arXiv:2404.06395, here with a linear decay.

    Args:
        config: The schedule.
        step: Number of optimizer steps already taken, from 0.
        num_steps: Number of planned optimizer steps of the whole run.
    """
    warmup = config.num_warmup_steps(num_steps)
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    if config.name == "wsd":
        decay = (0.1 if config.decay_ratio is None else config.decay_ratio) * num_steps
        remaining = max(0, num_steps - step)
        # A warm-up that reaches into the decay makes it shorter; the rate never jumps.
        shape = min(1.0, remaining / max(1.0, min(decay, num_steps - warmup)))
    else:
        shape = _shape(config, progress)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def _shape(config: LRScheduleConfig, progress: float) -> float:
    """Return the decay, from 1 at progress 0 to 0 at progress 1 (`constant` stays at 1)."""
    if config.name == "constant":
        return 1.0
    if config.name == "linear":
        return 1 - progress
    if config.name == "polynomial":
        return float((1 - progress) ** (config.power or 1.0))
    cycles = config.num_cycles or 1
    within = 1.0 if progress == 1 else cycles * progress % 1
    return (1 + math.cos(math.pi * within)) / 2


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    base_names: Collection[str] = (),
    base_lr: float | None = None,
    lora_plus_ratio: float | None = None,
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups; no group is empty, and those with the optimizer's own rate come first.

    Vectors (biases, norms) get no weight decay. With LoRA+, the groups of the B matrices have an `lr_ratio`;
    `build_optimizer` multiplies their rate by it.

    Args:
        named_parameters: All parameters of the model.
        base_names: Names of the parameters that learn at `base_lr`.
        base_lr: Learning rate of these parameters; `None` for the optimizer's own.
        lora_plus_ratio: LoRA+ (Hayou et al., 2024, arXiv:2402.12354): rate of B matrices divided by that of A
            matrices; `None` for one rate.

    Raises:
        UserError: If no parameter trains, or there is no B matrix for LoRA+.
    """
    groups: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            is_base = base_lr is not None and name in base_names
            is_b = lora_plus_ratio is not None and re.search(r"\.lora_(embedding_)?B\b", name) is not None
            kind = 2 if is_base else 1 if is_b else 0
            groups.setdefault((kind, len(full_shape(parameter)) < 2), []).append(parameter)
    if not groups:
        raise UserError("model: no parameter trains; set model.adapter, or remove it for full fine-tuning")
    if lora_plus_ratio is not None and not any(kind == 1 for kind, _ in groups):
        raise UserError(f"model.adapter.lora_plus_ratio: {lora_plus_ratio}, but the adapter has no LoRA B matrices")
    rates: list[dict[str, Any]] = [{}, {"lr_ratio": lora_plus_ratio}, {"lr": base_lr}]
    return [
        {"params": groups[kind, is_vector], **rates[kind], **({"weight_decay": 0.0} if is_vector else {})}
        for kind, is_vector in sorted(groups)
    ]


def build_optimizer(make: Callable[[Any], Optimizer], groups: list[dict[str, Any]]) -> Optimizer:
    """Make the optimizer, and multiply the rate of each group by its `lr_ratio`.

    Args:
        make: `model.optimizer`: makes an optimizer over groups.
        groups: From `parameter_groups`.

    Raises:
        UserError: If the class does not accept its arguments, or sets its rate itself, which a schedule cannot scale.
    """
    try:
        optimizer = make(groups)
    except (ValueError, TypeError) as error:
        raise UserError(f"model.optimizer.init_args: not accepted by the optimizer: {error}") from error
    for group in optimizer.param_groups:
        if group["lr"] is None:
            raise UserError(
                f"model.optimizer: {type(optimizer).__name__} without lr sets its own rate, which model.lr_scheduler "
                "cannot scale; set init_args: {lr: 1.0e-3, relative_step: false, scale_parameter: false}"
            )
        group["lr"] *= group.pop("lr_ratio", 1.0)
    return optimizer


def clip_gradients(
    optimizer: Optimizer, value: float | None, algorithm: str | None, scaler: torch.amp.GradScaler | None = None
) -> torch.Tensor:
    """Clip the gradients as the trainer says, and return their norm; does not wait for the device.

    Args:
        optimizer: The optimizer whose parameters have the gradients.
        value: `trainer.gradient_clip_val`; `None` or 0 for no clipping.
        algorithm: `trainer.gradient_clip_algorithm`: `norm` (the default) or `value`.
        scaler: What scaled the loss; it leaves the gradients of a fused optimizer to the optimizer's step, which would
            unscale them too late for their norm and for clipping.

    Returns:
        The L2 norm before clipping, over all processes, a scalar.
    """
    if scaler is not None and unscales_in_step(optimizer):
        scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # sharded: over all processes
    if value and algorithm != "value":
        torch.nn.utils.clip_grads_with_norm_(parameters, value, norm)
    elif value:
        torch.nn.utils.clip_grad_value_(parameters, value)
    return norm


def check_float16(optimizer: Optimizer, *, scales_loss: bool) -> None:
    """Check that no float16 weight trains.

    Args:
        optimizer: The optimizer.
        scales_loss: Whether the trainer scales the loss, as `trainer.precision: 16-mixed` does.

    Raises:
        UserError: If float16 weights train.
    """
    if not any(parameter.dtype == torch.float16 for group in optimizer.param_groups for parameter in group["params"]):
        return
    if scales_loss:
        raise UserError(
            "model.dtype: float16 weights of the base train, and trainer.precision: 16-mixed cannot unscale their "
            "gradients; set model.dtype: float32"
        )
    raise UserError(
        "model.dtype, trainer.precision: float16 weights train without a scaled loss and would become NaN, because "
        "gradients below 6e-8 and AdamW's eps of 1e-8 are zero in float16; set model.dtype: float32 with "
        "trainer.precision: bf16-mixed (16-mixed on a GPU without bfloat16)"
    )
