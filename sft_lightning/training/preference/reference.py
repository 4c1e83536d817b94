"""Which model is the reference of preference training: the model before training, kept in one of two ways.

A copy of the model would take its memory twice. If the adapter's update starts at zero, the model before training is
the model with its adapter switched off. Otherwise two log-probabilities per pair are computed before training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from peft import PeftModel

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.trainable import trainable_base_names
from sft_lightning.training.preference.losses import Reference

_STARTS_AT_ZERO = ("default", "gaussian")
"""Values of `model.adapter.init` with which a new adapter changes nothing and leaves the base as it is."""


class ReferenceChoice(NamedTuple):
    """Where the reference's log-probabilities come from."""

    kind: Literal["adapter_off", "precomputed"]
    """`adapter_off`: a second forward pass in every step. `precomputed`: one pass over the data before training."""

    reason: str
    """Why, for the log."""


def choose_reference(setting: Reference, model: torch.nn.Module, adapter: AdapterConfig | None) -> ReferenceChoice:
    """Return where the reference's log-probabilities come from.

    Args:
        setting: `model.preference.reference`.
        model: The model, adapter included.
        adapter: Its configuration; `None` for full fine-tuning.

    Raises:
        UserError: If the setting is `adapter_off`, and no unchanged model is left without the adapter.
    """
    changes = _why_not_switched_off(model, adapter)
    if setting == "precomputed":
        return ReferenceChoice("precomputed", "set by model.preference.reference")
    if setting == "adapter_off":
        if changes is not None and (adapter is None or adapter.path is None or trainable_base_names(model)):
            raise UserError(f"model.preference.reference: adapter_off, but {changes}; use precomputed")
        return ReferenceChoice("adapter_off", "set by model.preference.reference")
    if changes is not None:
        return ReferenceChoice("precomputed", changes)
    return ReferenceChoice("adapter_off", "the adapter's update starts at zero")


def _why_not_switched_off(model: torch.nn.Module, adapter: AdapterConfig | None) -> str | None:
    """Return why the model with its adapter switched off is not the model before training; `None` if it is."""
    if adapter is None or not isinstance(model, PeftModel):
        return "there is no adapter to switch off"
    base = sorted(trainable_base_names(model))
    if base:
        return f"weights of the base train too ({base[0]}, …)"
    if adapter.path is not None:
        return f"training continues from the adapter in {adapter.path}, which is part of the model before training"
    if adapter.peft_config is not None:
        return "not every PEFT method starts at the base model"
    if adapter.init not in _STARTS_AT_ZERO:
        return f"model.adapter.init: {adapter.init} changes the base, or does not start at it"
    return None


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Switch the adapter off inside the block, `modules_to_save` included; afterwards the same parameters train."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, trains in flags:
            parameter.requires_grad = trains
