"""The groups of parameters that FSDP2 shards and gathers together (`torch.distributed.fsdp.fully_shard`).

Each decoder layer is a group: its parameters are gathered just before it runs and freed after it. An untied input
embedding is a group, too. The rest (final norm, head, tied embedding) stays gathered during the whole forward pass.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sft_lightning.compat.bitsandbytes import keep_quantization_states
from sft_lightning.errors import UserError
from sft_lightning.strategies.names import DDP, FSDP2

_KEPT_SHARE = 0.05
"""Largest share of a device's memory that gathered weights may take from the forward to the backward pass. `auto`
decisions about memory do not see it, and have a larger margin."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return a transformer's decoder layers, in order.

    They are the longest module list whose members are all of transformers' `GradientCheckpointingLayer`, or the longest
    list of all in a model whose code is older than that class.

    Raises:
        UserError: If the model has no list of modules.
    """
    lists: list[nn.ModuleList] = [
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise UserError(
            f"trainer.strategy: {FSDP2} shards layer by layer, but {type(model).__name__} has no list of layers; use "
            f"{DDP}"
        )
    checkpointed = [each for each in lists if all(isinstance(layer, GradientCheckpointingLayer) for layer in each)]
    return max(([*each] for each in checkpointed or lists), key=len)


def shard_groups(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules to shard one by one, inner modules first; the last one is the model itself."""
    groups = decoder_layers(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)
    if type(embedding) is nn.Embedding and not tied:
        groups.append(embedding)
    return [*groups, model]


def shard_model(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    offload: bool = False,
    gather_dtype: torch.dtype | None = None,
) -> None:
    """Shard a transformers model in place, adapters inside it included; a sharded model stays as it is.

    While a layer computes, the next one is gathered, in the forward pass and in the backward pass.

    Args:
        model: The base model; its parameters become DTensors, sharded by their first axis.
        mesh: Of shape (P,), the model is sharded over all P processes. Of shape (R, P / R), it is replicated over the
            first axis and sharded over the second.
        device: Where this process computes.
        offload: Keep shards, gradients and the optimizer's state in CPU memory.
        gather_dtype: Type that weights are gathered and gradients are reduced in; default: their own. Shards, and the
            optimizer that steps on them, keep theirs.

    Raises:
        UserError: If weights of two types train in one group.
    """
    if isinstance(model, FSDPModule):
        return
    keep_quantization_states(model, device)
    layers, groups = decoder_layers(model), shard_groups(model)
    for module in groups:
        check_one_trainable_type(module)
    reshard = reshards_after_forward(_gathered_bytes(layers, gather_dtype), _device_bytes(device))
    options: dict[str, Any] = {} if reshard else {"reshard_after_forward": False}
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy()
    for module in groups:
        precision = mixed_precision(module, gather_dtype)
        fully_shard(module, mesh=mesh, offload_policy=policy, mp_policy=precision, **options)
    for before, after in pairwise(layers):
        cast("FSDPModule", before).set_modules_to_forward_prefetch([cast("FSDPModule", after)])
        cast("FSDPModule", after).set_modules_to_backward_prefetch([cast("FSDPModule", before)])


def mixed_precision(module: nn.Module, gather_dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """Return the types that a group is gathered and reduced in.

    Autocast decides what each operation computes in, so inputs are not cast. A group with quantized weights keeps its
    types: its numbers are packed into tensors of another type, which a cast would destroy.

    Args:
        module: The group.
        gather_dtype: As for `shard_model`.
    """
    if gather_dtype is None or any(isinstance(each, Linear4bit | Linear8bitLt) for each in module.modules()):
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=gather_dtype, cast_forward_inputs=False)


def reshards_after_forward(gathered_bytes: float, device_bytes: float) -> bool:
    """Whether a layer's gathered weights are freed after the forward pass, and gathered again for the backward pass.

    Small models keep them: that saves a third of what the processes send.

    Args:
        gathered_bytes: Bytes of all layers' weights, gathered.
        device_bytes: Memory of the device in bytes.
    """
    return gathered_bytes > _KEPT_SHARE * device_bytes


def _gathered_bytes(layers: list[nn.Module], gather_dtype: torch.dtype | None) -> int:
    total = 0
    for layer in layers:
        cast_to = mixed_precision(layer, gather_dtype).param_dtype
        total += sum(each.numel() * (cast_to or each.dtype).itemsize for each in layer.parameters())
    return total


def _device_bytes(device: torch.device) -> int:
    """Return the memory of a GPU; 0 for a CPU, whose processes share theirs."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def check_one_trainable_type(module: nn.Module) -> None:
    """Check that all weights that train in a module have one type, because their gradients are reduced together.

    Raises:
        UserError: If they have several; FSDP2 itself fails only in the first backward pass.
    """
    found = {parameter.dtype: name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if len(found) > 1:
        types = ", ".join(f"{str(dtype).removeprefix('torch.')} ({name})" for dtype, name in found.items())
        raise UserError(
            f"trainer.strategy: {FSDP2} reduces all gradients of a layer in one type, but this layer trains weights of "
            f"several: {types}; set model.dtype: float32 (with trainer.precision: bf16-mixed), or use {DDP}"
        )
