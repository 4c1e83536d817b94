"""PEFT's methods on a quantized base: which of them cannot read its weights, and what the others need."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.trainable import HALF, keep_float32_masters
from sft_lightning.models.base.config import QuantizationConfig

_INITS = {"pissa": (4, 8), "mica": (4, 8), "orthogonal": (8,)}
"""Initial weights of LoRA that PEFT takes from the base's weights without looking whether they are quantized, and the
bits in which they are then."""

_METHODS = {"DELORA": (4, 8), "OSF": (4, 8), "LOHA": (4,), "LOKR": (4,), "HRA": (4,)}
"""Methods that compute with the base's weights themselves, and take packed ones for values."""

_FLOAT32_METHODS = {"SHIRA": (8,)}
"""Methods that get float32 weights from a quantized base and multiply 16-bit inputs by them."""


def check_quantized_base(config: PeftConfig, quantization: QuantizationConfig, dtype: str) -> None:
    """Check that PEFT can put a method on a quantized base, before anything is loaded.

    Args:
        config: PEFT's configuration of the method.
        quantization: How the base is stored.
        dtype: `model.dtype`.

    Raises:
        UserError: If PEFT fails on such a base, or computes nonsense.
    """
    bits, kind = quantization.bits, str(getattr(config.peft_type, "value", config.peft_type))
    init = getattr(config, "init_lora_weights", None)
    if bits in _INITS.get(str(init), ()):
        raise UserError(
            f"model.adapter.init: {init!r} starts from the base's own weights, which PEFT cannot read in {bits} bits "
            "(model.quantization); use default, gaussian or olora, or set model.quantization: null"
        )
    if bits in _METHODS.get(kind, ()):
        way_out = "" if 8 in _METHODS[kind] else "model.quantization.bits: 8, "
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
    """Make a freshly wrapped model compute as it is to be trained: float32 masters, types that go together.

    Raises:
        UserError: As `keep_float32_masters`.
    """
    keep_float32_masters(model)
    keep_input_dtype(model)


def keep_input_dtype(model: torch.nn.Module) -> None:
    """Let adapted quantized layers answer 16-bit inputs in 16 bits.

    Several of PEFT's methods (IA3, AdaLoRA, RandLoRA, RoAd) answer in float32 there, which attention does not take
    beside the 16-bit answers of other layers.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), Linear4bit | Linear8bitLt):
            module.register_forward_hook(_to_input_dtype)


def _to_input_dtype(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return output.to(args[0].dtype) if args[0].dtype in HALF and output.dtype == torch.float32 else output
