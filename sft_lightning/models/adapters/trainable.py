"""Set which weights train without an adapter or beside one, and keep trained modules in float32."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from bitsandbytes.nn.modules import Int8Params, Params4bit
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper

from sft_lightning.compat.peft import adapter_name_parts, is_replaced_by_adapter
from sft_lightning.errors import UserError
from sft_lightning.models.adapters.folder import name_in_base

HALF = (torch.float16, torch.bfloat16)


def train_only(model: torch.nn.Module, patterns: Sequence[str]) -> None:
    """Train the parameters whose names contain a match of `model.trainable`, and freeze all others.

    Args:
        model: Changed in place.
        patterns: Regular expressions.

    Raises:
        UserError: If a pattern matches no name, or is not a valid regular expression.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise UserError(f"model.trainable: {pattern!r} is not a valid regular expression: {error}") from error
        if not found:
            raise UserError(
                f"model.trainable: {pattern!r} matches no parameter's name; the names are: {_summary(names)}"
            )
        chosen |= found
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in chosen


def _summary(names: Sequence[str]) -> str:
    """Return all names with layer numbers replaced by `N`, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names))


def train_base(model: PeftModel) -> None:
    """Also train every floating-point weight that has no adapter and is not quantized: embeddings, norms, biases, head.

    DeepSpeed-Chat does the same without `--only_optimize_lora` (dschat/utils/module/lora.py).
    """
    for name, parameter in model.named_parameters():
        replaced = is_replaced_by_adapter(name)
        if parameter.is_floating_point() and not replaced and not isinstance(parameter, Params4bit | Int8Params):
            parameter.requires_grad = True


def trainable_base_names(model: torch.nn.Module) -> set[str]:
    """Return the names of the trainable parameters that belong to the base; empty without an adapter."""
    if not isinstance(model, PeftModel):
        return set()
    marks = adapter_name_parts(model)
    trainable = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name for name in trainable if not any(mark in name for mark in marks)}


def keep_base_weights(model: PeftModel, names: Collection[str]) -> None:
    """Note frozen weights of the base that belong to a continued adapter, for its next export.

    Args:
        model: The model with the adapter.
        names: The base's own names of the weights; of tied ones, any.
    """
    model.kept_base_names = frozenset(  # type: ignore[assignment]
        name for name, _ in model.named_parameters() if name_in_base(name) in names
    )


def kept_base_names(model: torch.nn.Module) -> frozenset[str]:
    """Return the names of frozen weights of the base that the next export must have."""
    kept: frozenset[str] = getattr(model, "kept_base_names", frozenset())
    return kept


def keep_float32_masters(model: PeftModel) -> None:
    """Keep `modules_to_save` in float32 on a float16 or bfloat16 base, as PEFT keeps its adapters.

    Small updates are lost in 16 bits, and float16 gradients cannot be unscaled. The module computes in float32; its
    output is cast back to the type of the base.

    Raises:
        UserError: If such a module is quantized, and so cannot be trained.
    """
    # Collected before any is cast: tied modules share one parameter.
    found: list[tuple[torch.nn.Module, torch.dtype]] = []
    for name, wrapper in model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        for module in wrapper.modules_to_save.values():
            if any(isinstance(parameter, Params4bit | Int8Params) for parameter in module.parameters()):
                raise UserError(
                    f"model.adapter.modules_to_save: {name} is quantized and cannot be trained in full; put it into "
                    "target_modules, or remove it"
                )
            dtype = next(module.parameters()).dtype
            if dtype in HALF:
                found.append((module, dtype))
    for module, dtype in found:
        module.to(torch.float32)
        module.register_forward_pre_hook(_to_own_dtype)
        module.register_forward_hook(_ToDtype(dtype))


def _to_own_dtype(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


class _ToDtype:
    """A forward hook that casts a module's output; a class, so that the model can be copied and pickled."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(self.dtype)
