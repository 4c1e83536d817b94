from __future__ import annotations

from typing import Any

import bitsandbytes.optim
import pytest
import torch
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt
from torch import nn

from sft_lightning.compat import bitsandbytes as compat


def in_4_bits(*, storage: torch.dtype = torch.uint8) -> Any:
    """A layer of 64 × 64, quantized on the CPU."""
    torch.manual_seed(0)
    layer = Linear4bit(64, 64, compute_dtype=torch.float32, quant_storage=storage, quant_type="nf4")
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    return layer.to("cpu")


def in_8_bits() -> Any:
    torch.manual_seed(0)
    plain = nn.Linear(64, 64)
    layer = Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0)
    layer.weight = Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = plain.bias
    return layer.to("cpu"), plain


@pytest.mark.parametrize(("name", "bits"), [("AdamW8bit", 8), ("AdamW32bit", 32), ("PagedAdamW8bit", 8)])
def test_an_optimizer_of_bitsandbytes_tells_the_bits_of_its_state(name: str, bits: int) -> None:
    optimizer = getattr(bitsandbytes.optim, name)([nn.Parameter(torch.zeros(8))])
    assert compat.state_bits(optimizer) == bits


def test_another_librarys_optimizer_has_no_bits() -> None:
    assert compat.state_bits(torch.optim.AdamW([nn.Parameter(torch.zeros(1))])) is None


def test_4_bit_weights_are_not_repacked_in_evaluation_mode() -> None:
    layer = in_4_bits()
    layer.support_avx512bf16_for_cpu = True
    compat.protect_weights(layer)
    before = layer.weight.data.clone()
    layer.eval()
    layer(torch.ones(1, 64))
    assert torch.equal(layer.weight.data, before)


def test_an_8_bit_layer_gets_the_scales_back_that_a_copied_weight_lost() -> None:
    layer, _ = in_8_bits()
    compat.protect_weights(layer)
    x = torch.ones(1, 64)
    before, scales = layer(x), layer.state.SCB
    layer.weight.CB = layer.weight.data  # as PEFT's DoRA leaves it: the codes without their scales
    assert torch.equal(layer(x), before)
    assert layer.state.SCB is scales


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_packed_weights_stored_as_bytes_survive_a_cast_and_give_the_same_outputs(storage: torch.dtype) -> None:
    layer = in_4_bits(storage=storage)
    x = torch.randn(3, 64)
    before = layer(x)
    compat.store_4bit_as_bytes(layer)
    layer.to(torch.float16)
    layer.to(torch.float32)
    assert layer.weight.dtype == torch.uint8
    assert torch.equal(layer(x), before) or torch.allclose(layer(x), before, atol=1e-3)  # the bias was rounded


def test_a_layer_decodes_a_plain_parameter_with_the_state_that_it_keeps() -> None:
    layer = in_4_bits()
    x = torch.randn(3, 64)
    before = layer(x)
    compat.keep_quantization_states(layer, torch.device("cpu"))
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)  # as sharding does
    assert torch.equal(layer(x), before)


def test_without_outliers_a_token_is_rounded_by_itself_and_afterwards_as_before() -> None:
    layer, _ = in_8_bits()
    with compat.without_int8_outliers(nn.Sequential(layer)):
        assert layer.state.threshold == 0.0
    assert layer.state.threshold == 6.0


def test_a_4_bit_weight_is_decoded_to_what_the_layer_multiplies_by() -> None:
    layer = in_4_bits()
    weight = compat.dequantized_weight(layer).float()
    torch.testing.assert_close(layer(torch.eye(64)) - layer.bias, weight.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("after_a_forward_pass", [False, True])
def test_an_8_bit_weight_is_decoded_wherever_its_scales_are(after_a_forward_pass: bool) -> None:
    layer, plain = in_8_bits()
    if after_a_forward_pass:
        layer(torch.ones(1, 64))
    weight = compat.dequantized_weight(layer).float()
    torch.testing.assert_close(weight, plain.weight.detach(), atol=2e-3, rtol=0.0)
