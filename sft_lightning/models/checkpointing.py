"""Gradient checkpointing: which activations are kept for the backward pass, and which are computed again.

Four ways, from the fastest to the one that takes the least memory: keep everything; keep the outputs of matrix products
and attention of each layer, and compute what is cheap again (`selective`; Korthikanti et al., 2022, arXiv:2205.05198);
recompute every n-th layer; recompute all layers (Chen et al., 2016, arXiv:1604.06174).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sft_lightning.compat.dynamo import argument_of, calling_operations, changed_tensors
from sft_lightning.compat.torch import storage_key
from sft_lightning.compat.transformers import recompute_activations
from sft_lightning.errors import UserError

Recomputation = int | Literal["selective"]
"""What is recomputed: 0 nothing, n every n-th decoder layer (1: all), `selective` all but products and attention."""


def describe_recomputation(how: Recomputation) -> str:
    """Return what is recomputed, in words."""
    if how == "selective":
        return "selective, keeping matrix products and attention"
    ordinal = {0: "off", 1: "every decoder layer", 2: "every second decoder layer", 3: "every third decoder layer"}
    return ordinal.get(how, f"every {how}th decoder layer")


def free_memory_bytes(device: torch.device) -> float:
    """Return the free memory of a device, in bytes."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def recomputable_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Return the decoder layers that can be recomputed, or compiled, one by one, in the order of the model."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def enable_gradient_checkpointing(model: PreTrainedModel, how: Recomputation = 1) -> int:
    """Recompute layers in the backward pass; non-reentrant, so it works with frozen inputs.

    Args:
        model: The transformers model, without the PEFT model around it.
        how: What is recomputed; not 0. Every n-th layer starts with the first.

    Returns:
        The number of layers of which something is recomputed.

    Raises:
        UserError: If the model does not support it, or has fewer than n layers.
    """
    layers = recomputable_layers(model)
    every = 1 if how == "selective" else how
    if every > max(1, len(layers)):
        raise UserError(
            f"model.gradient_checkpointing: must be at most {max(1, len(layers))}, the number of decoder layers that "
            f"this {model.config.model_type} model can recompute (got {every})"
        )
    if not model.supports_gradient_checkpointing:
        raise UserError(f"model.gradient_checkpointing: {model.config.model_type} models do not support it; set false")
    recompute_activations(model, every, checked_selective_contexts if how == "selective" else None)
    return -(-len(layers) // every)


_PRODUCTS = frozenset(f"aten.{name}" for name in ("mm", "bmm", "addmm", "addmm_", "baddbmm"))


def is_kept(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether selective recomputation keeps an operation's output: that of a matrix product, or of attention.

    Attention with dropout is computed again, so that all random numbers after it are drawn as they were. So are
    products that are cheap for the size of their output: low-rank updates, and the scores of eager attention.

    Args:
        operation: An overload of a torch operation.
        args: Positional arguments of the call.
        kwargs: Named arguments of the call.
    """
    name = str(operation).rpartition(".")[0]
    if name in _PRODUCTS:
        # The update of a fused LoRA layer is added in place, to an output that is kept.
        return name == "aten.addmm_" or _is_dear(*args[-2:])
    library, _, function = name.partition(".")
    if library == "bitsandbytes":
        return "mm" in function or "matmul" in function
    if name in ("aten._scaled_mm", "aten._grouped_mm"):
        return True
    attends = any(word in function for word in ("attention", "attend", "attn")) and "backward" not in function
    return attends and not argument_of(operation, "dropout_p", args, kwargs)


def _is_dear(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether a product (…, k) · (k, n) takes many operations for each number of its output."""
    return 8 * left.shape[-1] > right.shape[-1]


def selective_contexts() -> tuple[Any, Any]:
    """Return the contexts of a layer's forward pass and of its recomputation, for `torch.utils.checkpoint`."""
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-any-return]


def checked_selective_contexts() -> tuple[Any, Any]:
    """Return `selective_contexts`, of which the first refuses a layer whose gradients would be wrong.

    If a kept output changes in place, as in Falcon, recomputation begins with what it has become. torch notices this
    only where the output is not a view. In compiled layers nothing changes in place.
    """
    forward, recompute = selective_contexts()
    kept: set[int] = set()

    def call(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = operation(*args, **kwargs)
        if is_kept(operation, args, kwargs):
            kept.update(_storages(out if isinstance(out, tuple) else (out,)))
        elif kept.intersection(_storages(changed_tensors(operation, args, kwargs))):
            raise UserError(
                "model.gradient_checkpointing: selective is not available for this model, in which an operation "
                f"({operation}) changes the output of a matrix product in place; set true"
            )
        return out

    return _Both(forward, calling_operations(call)), recompute


class _Both:
    """Two contexts as one."""

    def __init__(self, *contexts: AbstractContextManager[Any]) -> None:
        self._contexts = contexts

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)


def _storages(tensors: Iterable[Any]) -> set[int]:
    return {storage_key(tensor.untyped_storage()) for tensor in tensors if isinstance(tensor, torch.Tensor)}


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(operation, args, kwargs) else CheckpointPolicy.PREFER_RECOMPUTE
