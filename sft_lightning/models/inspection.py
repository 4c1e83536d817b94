"""What a loaded model is: the transformers model inside, its context, its device, its mode, whether it is sharded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from sft_lightning.compat.deepspeed import is_partitioned

_UNLIMITED = 1 << 30

# Mamba's fused kernels take `x_proj` and `out_proj` as plain tensors (peft#2274), and `dt_proj` is always multiplied by
# its weight directly: an adapter or a quantized layer in their place is never called.
_BYPASSED = {
    "mamba": frozenset({"x_proj", "dt_proj", "out_proj", "conv1d"}),
    "falcon_mamba": frozenset({"x_proj", "dt_proj", "out_proj", "conv1d"}),
    "mamba2": frozenset({"out_proj", "conv1d"}),
}


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model, without the PEFT model around it; adapters inside its layers stay."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"expected a transformers model inside, found a {type(base).__name__}")
    return base


def max_positions(config: PretrainedConfig) -> int:
    """Return the most tokens that a row can have; 2**30 if the configuration sets no limit."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit or _UNLIMITED


def bypassed_modules(config: PretrainedConfig) -> frozenset[str]:
    """Return the last name parts of linear layers whose weights the model reads without calling the layer.

    An adapter there would not train on a GPU, and a quantized weight would be read as plain numbers.
    """
    return _BYPASSED.get(config.model_type, frozenset())


def has_virtual_tokens(model: PreTrainedModel | PeftModel) -> bool:
    """Whether PEFT's forward puts virtual tokens before the text (prompt-learning methods, such as prefix tuning)."""
    return isinstance(model, PeftModel) and bool(model.active_peft_config.is_prompt_learning)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether this process holds only its part of some parameter, under FSDP2 or DeepSpeed ZeRO-3."""
    return any(hasattr(parameter, "device_mesh") or is_partitioned(parameter) for parameter in model.parameters())


def nonfinite_names(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that contain NaN or an infinite value; waits for their devices.

    Args:
        tensors: Name → tensor of any shape and type; integers are finite.
    """
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]


def computing_device(model: torch.nn.Module) -> torch.device:
    """Return the device that a model computes on; the shards of an offloaded model are stored elsewhere."""
    parameter = next(model.parameters())
    mesh = getattr(parameter, "device_mesh", None)
    return parameter.device if mesh is None else torch.device(mesh.device_type)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the block; afterwards every module has the mode that it had before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])  # some modules do more than keep a flag: PEFT's DoRA drops its cache
        for module, mode in modes:
            module.training = mode
