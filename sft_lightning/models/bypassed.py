"""Whether what was to be quantized is: families with linear layers of their own, or that read weights past them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.targets import BYPASSED


def check_quantized(model: PreTrainedModel) -> None:
    """Check that a model that was loaded quantized is, and only where it can be.

    transformers replaces layers of exactly the type `torch.nn.Linear`, and leaves Falcon's own kind as they are. Mamba
    takes the weights of its projections as plain tensors, where a quantized one is only bytes.

    Args:
        model: The model as loaded with a quantization.

    Raises:
        UserError: If nothing is quantized, or something whose weight the model reads past its module.
    """
    family = model.config.model_type
    quantized = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_quantized(module)}
    if not quantized:
        kinds = sorted({type(m).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear)} - {"Linear"})
        raise UserError(
            f"model.quantization: nothing in this {family} model was quantized, its layers "
            f"({', '.join(kinds) or 'none'}) are of a kind that transformers leaves as it is; set "
            "model.quantization: null, with a LoRA adapter on the base as it is"
        )
    if found := sorted(BYPASSED.get(family, set()) & quantized):
        raise UserError(
            f"model.quantization: {family} models read the weights of {', '.join(found)} past their modules, which "
            "cannot be done with quantized ones; set model.quantization: null, with a LoRA adapter on the base as it is"
        )


def _is_quantized(module: torch.nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.")
