"""Weights that a module uses though they are another's: ZeRO-3 gathers a module's own, and what is named here."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn


def gather_for_dora(model: nn.Module) -> None:
    """Let ZeRO-3 gather for every DoRA layer the weights whose norms it takes (Liu et al., 2024, arXiv:2402.09353).

    They are those of the base layer, and of the two low-rank layers beside it (peft/tuners/lora/dora.py).
    """
    register: Any = importlib.import_module("deepspeed").zero.register_external_parameter
    for layer in model.modules():
        magnitudes = getattr(layer, "lora_magnitude_vector", None)
        if not isinstance(magnitudes, nn.ModuleDict):
            continue
        parts: Any = layer
        for name, dora in magnitudes.items():
            for owner in (parts.get_base_layer(), parts.lora_A[name], parts.lora_B[name]):
                register(dora, owner.weight)


def external_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights that a module uses though they are another's, where DeepSpeed has been told so."""
    registered: dict[int, nn.Parameter] = getattr(module, "_external_params", {})
    return list(registered.values())
