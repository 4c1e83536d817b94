"""LLM.int8's linear layers as far as their memory goes, for fake tensors.

bitsandbytes keeps the input of every layer on the autograd context itself, out of reach of gradient checkpointing, and
makes whole copies on the way (0.50, `bitsandbytes/autograd/_functions.py`: MatMul8bitLt on CUDA, MatMul8bitFp on the
CPU, which shares its plan for weights). The layers here allocate the same.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F

from sft_lightning.compat.torch import forward_replaced_by

Int8Kernel = Literal["cuda", "cpu"]


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kernel: str) -> Any:
        ctx.x, ctx.weight = x, weight
        if kernel == "cpu":
            return F.linear(x, _unpacked(weight, x.dtype), bias)
        flat = x.reshape(-1, x.shape[-1])
        half = flat.to(torch.float16)
        codes = torch.empty_like(half, dtype=torch.int8)
        del half
        sums = torch.empty(len(flat), len(weight), dtype=torch.int32, device=x.device)
        out = sums.to(x.dtype)
        del codes, sums
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [grad] = grads
        flat = grad.reshape(-1, grad.shape[-1]).to(ctx.x.dtype)
        return (flat @ _unpacked(ctx.weight, ctx.x.dtype)).view(ctx.x.shape), None, None, None


def _unpacked(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(weight, dtype=dtype)


@contextmanager
def int8_layers(model: torch.nn.Module, linears: Collection[int], kernel: Int8Kernel | None) -> Iterator[None]:
    """Let linear layers take the memory of LLM.int8's inside.

    Args:
        model: A model of fake tensors.
        linears: `id` of the weights that are quantized.
        kernel: Whose copies are made; `None` leaves the layers as they are.
    """
    if kernel is None:
        yield
        return
    layers = [each for each in model.modules() if isinstance(each, torch.nn.Linear) and id(each.weight) in linears]
    with ExitStack() as patches:
        for layer in layers:
            patches.enter_context(forward_replaced_by(layer, functools.partial(_forward, layer, kernel)))
        yield


def _forward(layer: torch.nn.Linear, kernel: Int8Kernel, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _Int8Linear.apply(x, layer.weight, layer.bias, kernel)  # type: ignore[no-untyped-call]
    return out
