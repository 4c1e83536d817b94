"""Quantized base weights: NF4, FP4 and LLM.int8 through bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import BitsAndBytesConfig

from sft_lightning.errors import UserError


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the frozen base weights are stored.

    Raises:
        UserError: If `bits` is neither 4 nor 8.
    """

    bits: int = 4
    """4 (QLoRA, Dettmers et al., 2023, arXiv:2305.14314) or 8 (LLM.int8, Dettmers et al., 2022, arXiv:2208.07339)."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""

    double_quant: bool = True
    """Quantize the 4-bit quantization constants too: 0.4 bits per parameter less."""

    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type that 4-bit weights compute in; default: `model.dtype`."""

    storage_dtype: Literal["float32", "bfloat16", "float16", "uint8"] | None = None
    """Type that 4-bit weights are stored as, which strategies that shard by one uniform type look at; default: the
    type that they compute in."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UserError(f"model.quantization.bits: must be 4 or 8 (got {self.bits}); null for none")
        only_of_4_bits = [key for key in ("compute_dtype", "storage_dtype") if getattr(self, key) is not None]
        if self.bits == 8 and only_of_4_bits:
            raise UserError(f"model.quantization.{only_of_4_bits[0]}: is of 4-bit weights, and bits is 8; remove it")

    def to_transformers(self, dtype: torch.dtype) -> BitsAndBytesConfig:
        """Return the configuration that `from_pretrained` takes, for a model in `dtype`."""
        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        compute_dtype = getattr(torch, self.compute_dtype) if self.compute_dtype else dtype
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage=getattr(torch, self.storage_dtype) if self.storage_dtype else compute_dtype,
        )


def keep_weight_layout(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place when a CPU layer first runs in evaluation mode.

    On CPUs with AVX512-BF16 it does so for a faster kernel, and training goes on with the repacked weights: a
    validation or a sample would change what is learned. The kernel also refuses widths that 32 does not divide.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
