"""TrainingSpec and PreferenceSpec: the model, and how it is trained; every key under `model`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from sft_lightning.errors import UserError
from sft_lightning.models.generation.config import GenerationConfig
from sft_lightning.models.neftune import EmbeddingNoise
from sft_lightning.models.spec import ModelSpec
from sft_lightning.training.optim import LRScheduleConfig
from sft_lightning.training.preference.losses import PreferenceConfig


@dataclass(frozen=True, kw_only=True)
class TrainingSpec(ModelSpec):
    """A model, and how it is trained, evaluated and asked for answers.

    Raises:
        UserError: If keys contradict each other, or a value is out of range.
    """

    neftune_alpha: float | None = None
    """NEFTune (Jain et al., 2023, arXiv:2310.05914): noise on the embeddings while training, within ±alpha /
    sqrt(document length · width)."""

    gradient_checkpointing: bool | int | Literal["auto", "selective"] = "auto"
    """Recompute activations in the backward pass: `true`, `false`, `selective` (all but the outputs of matrix products
    and attention), a number n (every n-th decoder layer), or `auto`: the fastest of these that fits into memory."""

    torch_compile: bool | Literal["auto"] = "auto"
    """Compile the decoder layers for training, each by itself: `true`, `false`, or `auto`: on a GPU of compute
    capability 8.0 or above, if the run is long enough to save more time than compiling takes."""

    max_nonfinite_losses: int | None = 5
    """Stop after this many optimizer steps in a row with a NaN or infinite loss; `null` for no limit."""

    optimizer: Callable[[Any], Optimizer] = torch.optim.AdamW
    """Optimizer class and its arguments; the command line's default is fused AdamW with lr 2e-4."""

    lr_scheduler: LRScheduleConfig = LRScheduleConfig()  # noqa: RUF009 (frozen)
    """How the learning rate changes over the planned optimizer steps."""

    generation: GenerationConfig = GenerationConfig()  # noqa: RUF009 (frozen)
    """How `predict` generates answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neftune_alpha is not None:
            EmbeddingNoise(self.neftune_alpha)  # checks the range
        if not isinstance(self.gradient_checkpointing, bool | str) and self.gradient_checkpointing < 1:
            raise UserError(
                f"model.gradient_checkpointing: must be at least 1 (got {self.gradient_checkpointing}); n recomputes "
                "every n-th decoder layer, false none"
            )
        if self.max_nonfinite_losses is not None and self.max_nonfinite_losses < 1:
            raise UserError(
                "model.max_nonfinite_losses: must be at least 1, or null for no limit "
                f"(got {self.max_nonfinite_losses})"
            )


@dataclass(frozen=True, kw_only=True)
class PreferenceSpec(TrainingSpec):
    """A model, and how it is trained with `task: dpo`.

    Raises:
        UserError: If keys contradict each other, or a value is out of range.
    """

    preference: PreferenceConfig = PreferenceConfig()  # noqa: RUF009 (frozen)
    """The loss on pairs of answers."""
