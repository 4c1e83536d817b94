"""Weights that a module uses though no forward pass of their owner gathers them: ZeRO-3 gathers those named here."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from torch import nn


def name_external_weights(model: nn.Module) -> None:
    """Let ZeRO-3 gather for every module, beside its own weights, those that it uses of others.

    Those are weights in a list or a dict of parameters, which is a module that never runs (PEFT keeps those of IA3,
    VeRA and of LoRA on embeddings so); and what DoRA takes the norms of (Liu et al., 2024, arXiv:2402.09353).
    """
    register: Any = importlib.import_module("deepspeed").zero.register_external_parameter
    for module in model.modules():
        for weight in _in_collections(module):
            register(module, weight)
        magnitudes = getattr(module, "lora_magnitude_vector", None)
        for name, dora in magnitudes.items() if isinstance(magnitudes, nn.ModuleDict) else ():
            for weight in _normed(module, name):
                register(dora, weight)


def _in_collections(module: nn.Module) -> Iterator[nn.Parameter]:
    for child in module.children():
        if isinstance(child, nn.ParameterDict | nn.ParameterList):
            yield from child.parameters()


def _normed(layer: Any, name: str) -> Iterator[nn.Parameter]:
    """Yield the weights whose norms DoRA takes: the base's and the two low-rank ones (peft/tuners/lora/dora.py)."""
    yield layer.get_base_layer().weight
    if name in layer.lora_A:
        yield from (layer.lora_A[name].weight, layer.lora_B[name].weight)
    else:  # an embedding's
        yield from (layer.lora_embedding_A[name], layer.lora_embedding_B[name])


def external_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights that a module uses though they are another's, where DeepSpeed has been told so."""
    registered: dict[int, nn.Parameter] = getattr(module, "_external_params", {})
    return list(registered.values())
