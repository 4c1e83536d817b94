"""Undocumented parts of bitsandbytes' layers and optimizers that we use."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from sft_lightning.compat.names import uses

if TYPE_CHECKING:
    import torch
    from torch import nn

_LINEAR_4BIT = "bitsandbytes.nn:Linear4bit"
_LINEAR_8BIT = "bitsandbytes.nn:Linear8bitLt"


@uses(
    "bitsandbytes.optim.optimizer:Optimizer8bit",
    feature="a bitsandbytes optimizer under a sharding trainer.strategy",
    since="0.43",
    replacement="the name of the class's module, which begins with `bitsandbytes.optim`",
)
def state_bits(optimizer: torch.optim.Optimizer) -> int | None:
    """Return the bits, 8 or 32, of the state of a bitsandbytes optimizer; `None` for other optimizers."""
    if not isinstance(optimizer, importlib.import_module("bitsandbytes.optim.optimizer").Optimizer8bit):
        return None
    options: Any = vars(optimizer)["args"]
    return int(options.optim_bits)


@uses(
    _LINEAR_4BIT,
    _LINEAR_8BIT,
    feature="model.quantization",
    since="0.49",
    replacement="not needed once bitsandbytes repacks a copy of the weights, and PEFT's DoRA copies the scales too",
)
def protect_weights(model: nn.Module) -> None:
    """Keep bitsandbytes and PEFT from changing quantized weights in place on a CPU.

    With AVX512-BF16, bitsandbytes repacks a layer's 4-bit weights for a faster kernel when the layer first runs in
    evaluation mode, and training continues with the repacked weights: a validation or a sample would change what is
    learned. That kernel also requires widths that are multiples of 32.

    PEFT's DoRA replaces an 8-bit weight by a copy without its scales whenever it reads it, so that the layer loses
    them.
    """
    nn: Any = importlib.import_module("bitsandbytes.nn")
    for module in model.modules():
        layer: Any = module
        if hasattr(module, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        if isinstance(module, nn.Linear8bitLt):
            module.register_forward_pre_hook(_return_scales)


def _return_scales(layer: Any, args: Any) -> None:
    if layer.weight.CB is not None and layer.weight.SCB is None:
        layer.weight.SCB = layer.state.SCB


@uses(
    _LINEAR_4BIT,
    feature="a 4-bit base with trainer.precision: bf16-true or trainer.strategy: deepspeed_stage_*",
    since="0.43",
    replacement="model.quantization.storage_dtype: uint8",
)
def store_4bit_as_bytes(model: nn.Module) -> None:
    """Reinterpret the packed weights of all 4-bit layers as bytes, which casts of floating-point types leave alone.

    `trainer.precision: bf16-true` and DeepSpeed cast a model to the type that it trains in; this would destroy weights
    that are packed into another floating-point type.
    """
    import torch

    for layer in _layers_of(model, "Linear4bit"):
        weight = layer.weight
        if weight.dtype != torch.uint8:
            weight.data = weight.data.contiguous().view(torch.uint8).reshape(-1, 1)
            weight.quant_storage = torch.uint8


@uses(
    _LINEAR_4BIT,
    feature="a 4-bit base under a trainer.strategy that shards weights",
    since="0.45",
    replacement="not needed once the layer keeps its state itself",
)
def keep_quantization_states(model: nn.Module, device: torch.device) -> None:
    """Keep the quantization state of every 4-bit layer on the layer, on the device that it computes on.

    bitsandbytes keeps the state on the parameter, which sharding replaces by a plain one. If the parameter has none,
    the layer's own is used (bitsandbytes/nn/modules.py, `fix_4bit_weight_quant_state_from_module`).

    Args:
        model: The model, before it is sharded.
        device: Where this process computes.
    """
    for layer in _layers_of(model, "Linear4bit"):
        state = getattr(layer.weight, "quant_state", None)
        if state is not None:
            state.to(device)
            layer.quant_state = state


@contextmanager
@uses(
    "bitsandbytes.autograd._functions:MatmulLtState.threshold",
    _LINEAR_8BIT,
    feature="comparing packed with separate documents on an 8-bit base",
    since="0.43",
    replacement="a tolerance as large as the effect of outlier columns",
)
def without_int8_outliers(model: nn.Module) -> Iterator[None]:
    """Switch off the outlier columns of LLM.int8, so that each token is rounded independently of the others.

    LLM.int8 keeps a column in 16 bits if any token of the micro-batch has an outlier there. The rounding of a token so
    depends on the other tokens, packed or not. Comparisons between packed and separate documents must exclude that.
    """
    states = [layer.state for layer in _layers_of(model, "Linear8bitLt")]
    thresholds = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold


@uses(
    "bitsandbytes.functional:dequantize_4bit",
    "bitsandbytes.functional:int8_vectorwise_dequant",
    feature="merge --base dequantized",
    since="0.45",
    replacement="the layer's output for an identity matrix",
)
def dequantized_weight(layer: Any) -> torch.Tensor:
    """Return the dequantized weight of a quantized layer, (out, in)."""
    functional = importlib.import_module("bitsandbytes.functional")
    if isinstance(layer, importlib.import_module("bitsandbytes.nn").Linear4bit):
        return cast("torch.Tensor", functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    # The first forward pass moves the scales from the weight to the layer's state.
    scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    return cast("torch.Tensor", functional.int8_vectorwise_dequant(layer.weight.data, scales))


def _layers_of(model: nn.Module, kind: str) -> list[Any]:
    wanted = getattr(importlib.import_module("bitsandbytes.nn"), kind)
    return [module for module in model.modules() if isinstance(module, wanted)]
