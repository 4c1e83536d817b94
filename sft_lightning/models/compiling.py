"""Compile a model layer by layer: layers are alike, so one compilation serves all, in seconds instead of minutes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.attention.packed import PACKED, HiddenLengths, packed_attention
from sft_lightning.models.checkpointing import recomputable_layers


def compile_layers(model: PreTrainedModel) -> int:
    """Compile each decoder layer in place; names, weights and state dict do not change.

    Rows differ in length, so lengths are dynamic from the start. `packed_attention` is not compiled: every row has
    other document lengths, and each set of them would cause a new compilation. See
    https://docs.pytorch.org/tutorials/recipes/regional_compilation.html.

    Args:
        model: The transformers model, without the PEFT model around it; adapters inside its layers are compiled too.

    Returns:
        The number of layers.

    Raises:
        UserError: If the model has no layers that can be compiled one by one.
    """
    layers = recomputable_layers(model)
    if not layers:
        raise UserError(
            f"model.torch_compile: not available for this {model.config.model_type} model, whose decoder layers "
            "transformers does not mark; set false"
        )
    model.base_model.register_forward_pre_hook(_hide_lengths, with_kwargs=True)
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
    for layer in layers:
        torch.nn.Module.compile(layer, dynamic=True)
    return len(layers)


def _hide_lengths(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    lengths = kwargs.get("document_lengths")
    return args, kwargs if lengths is None else {**kwargs, "document_lengths": HiddenLengths(lengths)}
