"""Quantized base weights by bitsandbytes: NF4, FP4 and LLM.int8."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from sft_lightning.compat.bitsandbytes import protect_weights
from sft_lightning.compat.transformers import plain_falcon_layers, quantizing_on
from sft_lightning.errors import UserError
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.pretrained import load_pretrained
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
    with falcon, quantizing_on(fastest_device()):
        model = load_pretrained(name_or_path, config=config, dtype=dtype, quantization_config=stored, **options)
    check_quantized(model)
    protect_weights(model)
    return model


def check_quantized(model: PreTrainedModel) -> None:
    """Check that some layer of a model is quantized.

    Raises:
        UserError: If none is; transformers leaves layers of other types than `torch.nn.Linear` as they are.
    """
    if not any(isinstance(module, Linear4bit | Linear8bitLt) for module in model.modules()):
        kinds = sorted({type(m).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear)} - {"Linear"})
        raise UserError(
            f"model.quantization: transformers quantized no layer of this {model.config.model_type} model (linear "
            f"layers: {', '.join(kinds) or 'none'}); set model.quantization: null, and use a LoRA adapter"
        )


def fastest_device() -> torch.device:
    """Return this process's GPU, if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
