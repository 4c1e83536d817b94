"""torch.compile, layer by layer: the layers are alike, so one compilation serves all, in seconds instead of minutes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.attention.packed import PACKED, HiddenLengths, packed_attention
from sft_lightning.models.checkpointing import recomputable_layers


def compile_layers(model: PreTrainedModel) -> int:
    """Compile each decoder layer in place; names, weights and state dict stay as they are.

    Rows differ in length, so lengths are dynamic from the start. Attention within documents (`packed_attention`) stays
    outside of what is compiled: documents are different in every row, and each set of lengths would be compiled anew.
    See https://docs.pytorch.org/tutorials/recipes/regional_compilation.html.

    Args:
        model: The model, without an adapter around it; adapters inside its layers are compiled with them.

    Returns:
        How many layers there are.

    Raises:
        UserError: If the model has no layers to compile one by one.
    """
    layers = recomputable_layers(model)
    if not layers:
        raise UserError(
            f"model.torch_compile: this {model.config.model_type} model has no decoder layers that transformers marks "
            "as such; set false"
        )
    model.base_model.register_forward_pre_hook(_hide_lengths, with_kwargs=True)
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
    for layer in layers:
        torch.nn.Module.compile(layer, dynamic=True)
    return len(layers)


def _hide_lengths(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    lengths = kwargs.get("document_lengths")
    return args, kwargs if lengths is None else {**kwargs, "document_lengths": HiddenLengths(lengths)}
