"""torch.compile, layer by layer: the layers are alike, so one compilation serves all, in seconds instead of minutes."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.memory import decoder_layers


def compile_layers(model: PreTrainedModel) -> int:
    """Compile each decoder layer in place; names, weights and state dict stay as they are.

    Rows differ in length, so lengths are dynamic from the start. Attention within documents stays outside of what is
    compiled (`attention.packed_attention`): documents are different in every row, and each set of lengths would be
    compiled anew. See https://docs.pytorch.org/tutorials/recipes/regional_compilation.html.

    Args:
        model: The model, without an adapter around it; adapters inside its layers are compiled with them.

    Returns:
        How many layers there are.

    Raises:
        UserError: If the model has no layers to compile one by one.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UserError(
            f"model.torch_compile: this {model.config.model_type} model has no decoder layers that transformers marks "
            "as such; set false"
        )
    for layer in layers:
        torch.nn.Module.compile(layer, dynamic=True)
    return len(layers)
