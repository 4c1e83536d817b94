from __future__ import annotations

import pytest
import torch

from sft_lightning.errors import UserError
from sft_lightning.models.base.config import QuantizationConfig


def test_nf4_with_double_quantization_is_the_default() -> None:
    config = QuantizationConfig().to_transformers(torch.bfloat16)
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == config.bnb_4bit_quant_storage == torch.bfloat16


def test_fp4_and_single_quantization_can_be_chosen() -> None:
    config = QuantizationConfig(quant_type="fp4", double_quant=False).to_transformers(torch.float32)
    assert config.bnb_4bit_quant_type == "fp4"
    assert not config.bnb_4bit_use_double_quant


def test_8_bits_are_llm_int8() -> None:
    assert QuantizationConfig(bits=8).to_transformers(torch.float32).load_in_8bit


@pytest.mark.parametrize("bits", [0, 2, 16])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(UserError, match="must be 4 or 8"):
        QuantizationConfig(bits=bits)


def test_compute_and_storage_types_can_be_chosen() -> None:
    config = QuantizationConfig(compute_dtype="float32", storage_dtype="uint8").to_transformers(torch.bfloat16)
    assert config.bnb_4bit_compute_dtype == torch.float32
    assert config.bnb_4bit_quant_storage == torch.uint8


@pytest.mark.parametrize("key", ["compute_dtype", "storage_dtype"])
def test_types_of_4_bit_weights_are_refused_with_8_bits(key: str) -> None:
    with pytest.raises(UserError, match=f"quantization.{key}: only valid with bits: 4"):
        QuantizationConfig(bits=8, **{key: "float32"})  # type: ignore[arg-type]
