"""PEFT's methods on a quantized base: refuse those that cannot read its weights, and fix the types of the others."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.folder import method_name
from sft_lightning.models.adapters.trainable import HALF, keep_float32_masters
from sft_lightning.models.base.config import QuantizationConfig

_UNREADABLE_INITS = {"pissa": (4, 8), "mica": (4, 8), "orthogonal": (8,)}
"""Values of `init_lora_weights` that PEFT computes from the base's weights as if they were not quantized, and the bits
for which that fails."""

_UNREADABLE_METHODS = {"DELORA": (4, 8), "OSF": (4, 8), "LOHA": (4,), "LOKR": (4,), "HRA": (4,)}
"""Methods that compute with the base's weights as if they were not quantized, and the bits for which that fails."""

_FLOAT32_METHODS = {"SHIRA": (8,)}
"""Methods that multiply 16-bit inputs by float32 weights on a quantized base, and the bits for which that fails."""


def check_quantized_base(config: PeftConfig, quantization: QuantizationConfig, dtype: str) -> None:
    """Check, before anything is loaded, that a PEFT method works on a quantized base.

    Args:
        config: PEFT's configuration of the method.
        quantization: How the base is quantized.
        dtype: `model.dtype`.

    Raises:
        UserError: If PEFT fails on such a base, or computes wrong values.
    """
    bits, kind = quantization.bits, method_name(config)
    init = getattr(config, "init_lora_weights", None)
    if bits in _UNREADABLE_INITS.get(str(init), ()):
        raise UserError(
            f"model.adapter.init: {init!r} starts from the base's own weights, which PEFT cannot read in {bits} bits "
            "(model.quantization); use default, gaussian or olora, or set model.quantization: null"
        )
    if bits in _UNREADABLE_METHODS.get(kind, ()):
        way_out = "" if 8 in _UNREADABLE_METHODS[kind] else "model.quantization.bits: 8, "
        raise UserError(
            f"model.adapter.peft_config: {kind} computes with the base's own weights, which PEFT cannot read in {bits} "
            f"bits (model.quantization); set {way_out}model.quantization: null, or use a LoRA adapter"
        )
    if dtype != "float32" and bits in _FLOAT32_METHODS.get(kind, ()):
        raise UserError(
            f"model.adapter.peft_config: PEFT's {kind} multiplies {dtype} inputs by float32 weights on a base in "
            f"{bits} bits; set model.dtype: float32, model.quantization.bits: 4, or use a LoRA adapter"
        )


def prepare_adapted(model: PeftModel) -> None:
    """Set the types of a model that PEFT has just wrapped: float32 masters, and outputs in the type of the inputs.

    Raises:
        UserError: If a module of `modules_to_save` is quantized.
    """
    keep_float32_masters(model)
    keep_input_dtype(model)


def keep_input_dtype(model: torch.nn.Module) -> None:
    """Cast the output of adapted quantized layers to the type of 16-bit inputs.

    Several PEFT methods (IA3, AdaLoRA, RandLoRA, RoAd) return float32 there; attention then fails, because other layers
    return 16 bits.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), Linear4bit | Linear8bitLt):
            module.register_forward_hook(_to_input_dtype)


def _to_input_dtype(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return output.to(args[0].dtype) if args[0].dtype in HALF and output.dtype == torch.float32 else output
