"""Parameter groups, and learning-rate schedules as pure functions of the planned optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sft_lightning.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LRScheduleConfig:
    """How the learning rate changes over the planned optimizer steps.

    Raises:
        UserError: If both `warmup_ratio` and `warmup_steps` are set, or a value is out of range.
    """

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""

    warmup_ratio: float | None = None
    """Share of all optimizer steps spent warming up linearly from zero."""

    warmup_steps: int | None = None
    """Warm-up in optimizer steps; excludes `warmup_ratio`. With neither, there is no warm-up."""

    min_lr_ratio: float = 0.0
    """The learning rate that the decay ends at, as a share of the peak."""

    def __post_init__(self) -> None:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise UserError(
                "model.lr_scheduler: set warmup_ratio or warmup_steps, not both "
                f"(got {self.warmup_ratio} and {self.warmup_steps})"
            )
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"model.lr_scheduler.warmup_ratio: must be in 0..1 (got {self.warmup_ratio})")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise UserError(f"model.lr_scheduler.warmup_steps: must be at least 0 (got {self.warmup_steps})")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"model.lr_scheduler.min_lr_ratio: must be in 0..1 (got {self.min_lr_ratio})")


def lr_factor(config: LRScheduleConfig, step: int, num_steps: int) -> float:
    """Return the factor on the peak learning rate at an optimizer step.

    Warm-up rises linearly from 0 at step 0 to 1 at the end of the warm-up; the decay reaches `min_lr_ratio` at
    `num_steps` (Loshchilov & Hutter, 2016, arXiv:1608.03983, for the cosine).

    Args:
        config: The schedule.
        step: Optimizer steps already taken, from 0.
        num_steps: Planned optimizer steps of the whole run.
    """
    warmup = config.warmup_steps if config.warmup_ratio is None else math.ceil(config.warmup_ratio * num_steps)
    warmup = warmup or 0
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    shape = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[config.name]
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def parameter_groups(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups: vectors (biases, norms) get no weight decay; no group is empty.

    Raises:
        UserError: If nothing trains.
    """
    trainable = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    if not trainable:
        raise UserError("model: nothing trains; set model.adapter, or remove it for full fine-tuning")
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable if parameter.ndim < 2]
    groups: list[dict[str, Any]] = []
    if matrices:
        groups.append({"params": matrices})
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return groups
