"""Build a model with random weights from a configuration, on the device that it trains on.

A quantized model is made on the meta device first, and its layers one after the other on the real one, so that the full
model in its 16 or 32 bits never exists.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sft_lightning.compat.bitsandbytes import protect_weights
from sft_lightning.compat.transformers import initialize_module, plain_falcon_layers, quantizer_of
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.quantization import check_quantized, fastest_device
from sft_lightning.models.inspection import base_model, bypassed_modules


def build_model(
    config: PretrainedConfig, quantization: QuantizationConfig | None, *, on_cpu: bool = False, **options: Any
) -> PreTrainedModel:
    """Build a model with random weights, drawn on the device that holds them.

    Args:
        config: The model's configuration.
        quantization: How the weights of linear layers are quantized; `None` for not at all.
        on_cpu: Build in CPU memory; default: on the GPU, if there is one, or on the device of a `torch.device` context.
        options: Further arguments of `from_config`, such as `dtype`.

    Raises:
        UserError: If it is to be quantized, and has no layer that transformers can quantize.
    """
    if quantization is not None:
        return _build_quantized(config, quantization, torch.device("cpu") if on_cpu else fastest_device(), **options)
    chosen = on_cpu or torch.get_default_device().type != "cpu"
    with nullcontext() if chosen else fastest_device():
        return base_model(AutoModelForCausalLM.from_config(config, **options))


def _build_quantized(
    config: PretrainedConfig,
    quantization: QuantizationConfig,
    device: torch.device,
    *,
    dtype: torch.dtype,
    **options: Any,
) -> PreTrainedModel:
    stored = quantization.to_transformers(dtype, unquantized=bypassed_modules(config))
    quantizer = quantizer_of(stored)
    falcon = plain_falcon_layers() if config.model_type == "falcon" else nullcontext()
    with falcon, torch.device("meta"):
        model = base_model(AutoModelForCausalLM.from_config(config, dtype=dtype, **options))
    quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": device})
    check_quantized(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}
    for module in model.modules():
        if not isinstance(module, Linear4bit | Linear8bitLt):
            module.to_empty(device=device, recurse=False)
    model.initialize_weights()  # of quantized layers, still on the meta device, this draws nothing
    model.tie_weights()
    for name, layer in layers.items():
        _draw_quantized(model, quantizer, name, layer, dtype=dtype, device=device)
    quantizer.postprocess_model(model)
    protect_weights(model)
    return model


def _draw_quantized(
    model: PreTrainedModel, quantizer: Any, name: str, layer: Any, *, dtype: torch.dtype, device: torch.device
) -> None:
    """Draw the weights of one layer in full precision as the model would, and quantize them as loading does."""
    of_conv = issubclass(layer.source_cls, Conv1D)
    with device:
        shape = (layer.out_features, layer.in_features) if of_conv else (layer.in_features, layer.out_features)
        dense: Any = Conv1D(*shape) if of_conv else torch.nn.Linear(*shape, bias=layer.bias is not None)
    dense.to(dtype)
    initialize_module(model, dense)
    quantize = quantizer.get_quantize_ops().convert
    made = quantize({f"{name}.weight": dense.weight.detach()}, model=model, full_layer_name=f"{name}.weight")
    (layer.weight,) = made.values()
    if layer.bias is not None:
        layer.bias = torch.nn.Parameter(cast("torch.Tensor", dense.bias).detach(), requires_grad=False)
