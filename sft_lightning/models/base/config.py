"""The keys of `model.dtype` and `model.quantization`.

Imports neither model code nor bitsandbytes, so that the command line shows its help quickly.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig

from sft_lightning.errors import UserError

DTypeName = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the frozen base weights are quantized.

    Raises:
        UserError: If `bits` is neither 4 nor 8, or a key for 4-bit weights is set with 8 bits.
    """

    bits: int = 4
    """4 (QLoRA, Dettmers et al., 2023, arXiv:2305.14314) or 8 (LLM.int8, Dettmers et al., 2022, arXiv:2208.07339)."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""

    double_quant: bool = True
    """Quantize the quantization constants of 4-bit weights, too; saves 0.4 bits per parameter."""

    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type that 4-bit layers compute in; default: `model.dtype`."""

    storage_dtype: Literal["float32", "bfloat16", "float16", "uint8"] | None = None
    """Type of the tensors that 4-bit weights are packed into, for strategies that require one type per shard; default:
    `compute_dtype`."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UserError(
                f"model.quantization.bits: must be 4 or 8 (got {self.bits}); set model.quantization: null for none"
            )
        only_of_4_bits = [key for key in ("compute_dtype", "storage_dtype") if getattr(self, key) is not None]
        if self.bits == 8 and only_of_4_bits:
            raise UserError(f"model.quantization.{only_of_4_bits[0]}: only valid with bits: 4 (got 8); remove it")

    def to_transformers(self, dtype: torch.dtype, *, unquantized: Collection[str] = ()) -> BitsAndBytesConfig:
        """Return the configuration that `from_pretrained` takes.

        Args:
            dtype: Type of the weights that are not quantized.
            unquantized: Last name parts of modules that are not quantized, besides the head.
        """
        # None: transformers finds the head itself.
        skipped: Any = sorted({*unquantized, "lm_head"}) if unquantized else None
        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
        compute_dtype = getattr(torch, self.compute_dtype) if self.compute_dtype else dtype
        return BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skipped,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage=getattr(torch, self.storage_dtype) if self.storage_dtype else compute_dtype,
        )
