"""Quantized base weights by bitsandbytes: NF4, FP4 and LLM.int8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sft_lightning.compat.transformers import plain_falcon_layers, quantizing_on
from sft_lightning.errors import UserError
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.inspection import bypassed_modules


def load_quantized(
    name_or_path: str,
    quantization: QuantizationConfig,
    *,
    dtype: torch.dtype,
    config: PretrainedConfig | None = None,
    on_cpu: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Load a model with quantized weights.

    Weights that a model reads without calling their layer (Mamba) are not quantized.

    Args:
        name_or_path: Folder or Hub id.
        quantization: How the weights are quantized.
        dtype: Type of the weights that are not quantized.
        config: The model's configuration; default: that of `name_or_path`.
        on_cpu: Leave the weights in CPU memory; default: on the GPU, if there is one, which must have room for them.
        options: Further arguments of `from_pretrained`.

    Raises:
        UserError: If the model has no layer that transformers can quantize.
    """
    if config is None:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=options.get("trust_remote_code"))
    stored = quantization.to_transformers(dtype, unquantized=bypassed_modules(config))
    if on_cpu:
        options["device_map"] = {"": "cpu"}
    falcon = plain_falcon_layers() if config.model_type == "falcon" else nullcontext()
    with falcon, quantizing_on(_fastest_device()):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            name_or_path, config=config, dtype=dtype, quantization_config=stored, **options
        )
    if not any(isinstance(module, Linear4bit | Linear8bitLt) for module in model.modules()):
        kinds = sorted({type(m).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear)} - {"Linear"})
        raise UserError(
            f"model.quantization: transformers quantized no layer of this {config.model_type} model (linear layers: "
            f"{', '.join(kinds) or 'none'}); set model.quantization: null, and use a LoRA adapter"
        )
    _protect_weights(model)
    return model


def _fastest_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _protect_weights(model: torch.nn.Module) -> None:
    """Keep bitsandbytes and PEFT from changing quantized weights in place on a CPU.

    With AVX512-BF16, bitsandbytes repacks a layer's 4-bit weights for a faster kernel when the layer first runs in
    evaluation mode, and training continues with the repacked weights: a validation or a sample would change what is
    learned. That kernel also requires widths that are multiples of 32.

    PEFT's DoRA replaces an 8-bit weight by a copy without its scales whenever it reads it, so that the layer loses
    them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if isinstance(module, Linear8bitLt):
            module.register_forward_pre_hook(_return_scales)


def _return_scales(layer: Any, args: Any) -> None:
    if layer.weight.CB is not None and layer.weight.SCB is None:
        layer.weight.SCB = layer.state.SCB


def store_4bit_as_bytes(model: torch.nn.Module) -> None:
    """Reinterpret the packed weights of all 4-bit layers as bytes, which casts of floating-point types leave alone.

    `trainer.precision: bf16-true` and DeepSpeed cast a model to the type that it trains in; this would destroy weights
    that are packed into another floating-point type.
    """
    for module in model.modules():
        weight: Any = module.weight if isinstance(module, Linear4bit) else None
        if weight is not None and weight.dtype != torch.uint8:
            weight.data = weight.data.contiguous().view(torch.uint8).reshape(-1, 1)
            weight.quant_storage = torch.uint8


@contextmanager
def without_int8_outliers(model: torch.nn.Module) -> Iterator[None]:
    """Switch off the outlier columns of LLM.int8, so that each token is rounded independently of the others.

    LLM.int8 keeps a column in 16 bits if any token of the micro-batch has an outlier there. The rounding of a token so
    depends on the other tokens, packed or not. Comparisons between packed and separate documents must exclude that.
    """
    states = [module.state for module in model.modules() if isinstance(module, Linear8bitLt)]
    thresholds = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold
