"""LoRA's linear layer as one autograd function: the input is read once, nothing is saved twice, float32 masters.

PEFT computes `base(x) + B(A(dropout(x))) * scaling` as separate operations, in the adapter's float32 unless autocast
is on: it casts x, saves it twice, and writes the output three times. Here the low-rank update is added in the epilogue
of a matrix product (`addmm`), in the type that the base computes in; the adapter's weights stay float32 and are cast
on use.

The layers stay PEFT's: same modules, same parameter names, same state dict. Their class becomes a subclass that takes
this path where the layer is plain LoRA, and PEFT's own forward everywhere else (DoRA and other variants, merged or
disabled adapters, several adapters, weights that ZeRO-3 gathers module by module).
"""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import PeftModel
from peft.tuners import lora
from torch.autograd.function import once_differentiable

from sft_lightning.compat.deepspeed import is_partitioned
from sft_lightning.compat.torch import change_class, hidden_change, runs_more_than_forward


class _LoraUpdate(torch.autograd.Function):
    """`y + (dropout(x) Aᵀ) Bᵀ · scaling`; y is the base's output or, given the base's weight, is computed here too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        base: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        """Return the adapted output.

        Args:
            ctx: Keeps x, A, B and x Aᵀ for the backward pass.
            x: Input, (N, in), in the type to compute in.
            lora_a: A, (r, in), float32.
            lora_b: B, (out, r), float32.
            base: The base's output, (N, out); empty if it is computed here.
            weight: The base's frozen weight, (out, in), or packed in 4 bits; `None` if `base` is given.
            bias: The base's frozen bias, (out,).
            scaling: Factor on the update.
            dropout: Probability of dropping a value of x on its way to A.
        """
        state = _random_state(x.device) if dropout else None
        low_rank = (x * _mask(x, dropout) if dropout else x) @ lora_a.to(x.dtype).T
        up = lora_b.to(x.dtype).T
        if weight is None:
            y = torch.addmm(base, low_rank, up, alpha=scaling)
        else:
            y = F.linear(x, _dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))
            with hidden_change(y):
                y = y.addmm_(low_rank, up, alpha=scaling)
        ctx.save_for_backward(x, lora_a, lora_b, low_rank, weight)
        ctx.scaling, ctx.dropout, ctx.state = scaling, dropout, state
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x (N, in), A (r, in), B (out, r) and the base's output (N, out)."""
        x, lora_a, lora_b, low_rank, weight = ctx.saved_tensors
        wants_x, wants_a, wants_b, wants_base = ctx.needs_input_grad[:4]
        mask = _mask_again(x, ctx.dropout, ctx.state) if ctx.dropout else None
        grad_low_rank = (grad @ lora_b.to(grad.dtype)).mul_(ctx.scaling)
        grad_a = grad_b = grad_x = None
        if wants_a:
            grad_a = (grad_low_rank.T @ (x if mask is None else x * mask)).to(lora_a.dtype)
        if wants_b:
            grad_b = (grad.T @ low_rank).to(lora_b.dtype).mul_(ctx.scaling)
        if wants_x:
            down = lora_a.to(grad.dtype)
            grad_x = None if weight is None else grad @ _dense(weight, grad.dtype)
            if mask is not None:
                through_a = (grad_low_rank @ down).mul_(mask)
                grad_x = through_a if grad_x is None else grad_x.add_(through_a)
            else:
                grad_x = grad_low_rank @ down if grad_x is None else grad_x.addmm_(grad_low_rank, down)
        return grad_x, grad_a, grad_b, grad if wants_base else None, None, None, None, None


def _mask(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Return what dropout multiplies x (N, in) by: 0 or 1 / (1 - probability), from the device's random generator."""
    return F.dropout(torch.ones_like(x), probability)


def _mask_again(x: torch.Tensor, probability: float, state: torch.Tensor) -> torch.Tensor:
    """Return the mask (N, in) of the forward pass: keeping the generator's state costs less than keeping the mask."""
    now = _random_state(x.device)
    _set_random_state(x.device, state)
    mask = _mask(x, probability)
    _set_random_state(x.device, now)
    return mask


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_random_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def _dense(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the base's weight, (out, in), unpacked and in the type to compute in."""
    if isinstance(weight, Params4bit):
        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    return weight.to(dtype)


def adapted_linear(layer: Any, adapter: str, x: torch.Tensor) -> torch.Tensor:
    """Compute a plain LoRA layer.

    Args:
        layer: PEFT's layer around a linear one.
        adapter: Name of its one active adapter.
        x: Input, (..., in).

    Returns:
        (..., out), in the type that the base computes in.
    """
    inner = layer.get_base_layer()
    a, b, scaling = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
    probability = getattr(layer.lora_dropout[adapter], "p", 0.0) if layer.training else 0.0
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if torch.compiler.is_compiling():  # the compiler fuses the operations and decides itself what to save
        y = inner(x)
        low_rank = F.linear(F.dropout(x.to(y.dtype), probability), a.to(y.dtype))
        return cast(torch.Tensor, y + F.linear(low_rank, b.to(y.dtype)) * scaling)
    in_one = _computes_alike(inner, dtype)
    base = None if in_one else inner(x)
    with torch.autocast(x.device.type, enabled=False):
        flat = x.to(dtype if base is None else base.dtype).reshape(-1, x.shape[-1])
        given = flat.new_empty(0) if base is None else base.reshape(-1, base.shape[-1])
        y = _LoraUpdate.apply(  # type: ignore[no-untyped-call]
            flat, a, b, given, inner.weight if in_one else None, inner.bias if in_one else None, scaling, probability
        )
    return cast(torch.Tensor, y.view(*x.shape[:-1], y.shape[-1]))


def _computes_alike(inner: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether the base is a plain matrix product in a type, which may stand in one function with the update."""
    if _needs_its_call(inner):
        return False
    if isinstance(inner, Linear4bit):
        weight = inner.weight
        packed = type(weight) is Params4bit and weight.quant_state is not None and weight.shape[0] != 1
        return packed and inner.compute_dtype in (None, dtype)
    return type(inner) is torch.nn.Linear


def why_not_plain(layer: Any) -> str | None:
    """Return why a LoRA layer keeps PEFT's own forward pass for good, in a few words; `None` if it does not.

    Args:
        layer: PEFT's layer.
    """
    inner = layer.get_base_layer()
    if not isinstance(inner, torch.nn.Linear):
        return f"{type(inner).__name__} layer"
    if any(name in layer.lora_variant for name in layer.lora_A):
        return "variant of LoRA, such as DoRA"
    if any(b.bias is not None for b in layer.lora_B.values()):
        return "lora_bias"
    if any(parameter.requires_grad for parameter in inner.parameters()):
        return "base that trains too"
    return None


def _takes_fused_path(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a layer is plain LoRA as it stands now, with all its weights in this process's memory."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if args or kwargs or layer.disable_adapters or layer.merged or len(active) != 1 or why_not_plain(layer):
        return False
    return not (_needs_its_call(layer.lora_A[active[0]]) or _needs_its_call(layer.lora_B[active[0]]))


def _needs_its_call(module: torch.nn.Module) -> bool:
    """Whether a module's weight may be used only through its call: hooks run there, and ZeRO-3 gathers the weight."""
    return runs_more_than_forward(module) or is_partitioned(cast(torch.Tensor, module.weight))


class _Fused:
    """Mixed into PEFT's layers: the fused path where a layer is plain LoRA, PEFT's own elsewhere."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return (..., out) of (..., in)."""
        layer = cast(Any, self)
        if not _takes_fused_path(layer, args, kwargs):
            return cast(torch.Tensor, super().forward(x, *args, **kwargs))  # type: ignore[misc]
        (adapter,) = (name for name in layer.active_adapters if name in layer.lora_A)
        return adapted_linear(layer, adapter, x)


class FusedLinear(_Fused, lora.Linear):
    """PEFT's LoRA on a dense linear layer."""


class FusedLinear4bit(_Fused, lora.Linear4bit):  # type: ignore[misc]  # peft loads it lazily
    """PEFT's LoRA on a linear layer in 4 bits."""


class FusedLinear8bitLt(_Fused, lora.Linear8bitLt):  # type: ignore[misc]
    """PEFT's LoRA on a linear layer in 8 bits."""


_FUSED: dict[type, type] = {
    lora.Linear: FusedLinear,
    lora.Linear4bit: FusedLinear4bit,
    lora.Linear8bitLt: FusedLinear8bitLt,
}


def fuse_lora(model: PeftModel) -> None:
    """Let a model's plain LoRA layers compute as one function each, in place.

    Args:
        model: The adapted model.
    """
    for module in model.modules():
        if type(module) in _FUSED and why_not_plain(module) is None:
            change_class(module, _FUSED[type(module)])


def describe_unfused(model: PeftModel) -> str | None:
    """Say which LoRA layers keep PEFT's own forward pass, and why.

    Args:
        model: The adapted model, after `fuse_lora`.

    Returns:
        A line for the log; `None` if there are no such layers.
    """
    layers = [m for m in model.modules() if isinstance(m, lora.LoraLayer) and not isinstance(m, _Fused)]
    if not layers:
        return None
    kept = Counter(why_not_plain(layer) or f"{type(layer).__name__} layer" for layer in layers)
    reasons = ", ".join(f"{number} × {reason}" for reason, number in kept.items())
    return f"LoRA: {len(layers)} layers keep PEFT's own forward pass ({reasons})"
