"""Which parameters of a model are sharded together, and sharding them (FSDP2: `torch.distributed.fsdp.fully_shard`).

A decoder layer is a group: its parameters are gathered just before it runs and dropped behind it. An untied input
embedding is a group too; what is left (final norm, head, tied embedding) is gathered for the whole forward pass.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sft_lightning.compat.bitsandbytes import keep_quantization_states
from sft_lightning.errors import UserError


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return a transformer's layers, in order.

    They are the longest list of modules whose members can be recomputed one by one (transformers'
    `GradientCheckpointingLayer`), or simply the longest list where a model's code is older than that class.

    Raises:
        UserError: If the model has no list of modules.
    """
    lists: list[nn.ModuleList] = [
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise UserError(
            f"trainer.strategy: fsdp2 shards layer by layer, and {type(model).__name__} has no list of layers; use ddp"
        )
    checkpointed = [each for each in lists if all(isinstance(layer, GradientCheckpointingLayer) for layer in each)]
    return max(([*each] for each in checkpointed or lists), key=len)


def shard_groups(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that are sharded one by one, inner ones first; the last is the model itself."""
    groups = decoder_layers(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)
    if type(embedding) is nn.Embedding and not tied:
        groups.append(embedding)
    return [*groups, model]


def shard_model(model: PreTrainedModel, mesh: DeviceMesh, device: torch.device, *, offload: bool = False) -> None:
    """Shard a transformers model, adapters inside it included, in place; a model that is sharded already is left alone.

    Args:
        model: The base model; its parameters become DTensors, sharded by their first axis.
        mesh: One axis: fully sharded over it. Two: replicated over the first, sharded over the second.
        device: Where this process computes.
        offload: Keep shards, gradients and the optimizer's state in host memory.

    Raises:
        UserError: If weights of two types train in one group, whose gradients are reduced together.
    """
    if isinstance(model, FSDPModule):
        return
    keep_quantization_states(model, device)
    groups = shard_groups(model)
    for module in groups:
        check_one_trainable_type(module)
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy()
    for module in groups:
        fully_shard(module, mesh=mesh, offload_policy=policy)


def check_one_trainable_type(module: nn.Module) -> None:
    """Check that all weights that train in a module have one type.

    Raises:
        UserError: If not; FSDP2 would only say so within the first backward pass.
    """
    found = {parameter.dtype: name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if len(found) > 1:
        types = ", ".join(f"{str(dtype).removeprefix('torch.')} ({name})" for dtype, name in found.items())
        raise UserError(
            f"trainer.strategy: fsdp2 reduces the gradients of a layer together, and weights of several types train "
            f"in one: {types}; set model.dtype: float32 (with trainer.precision: bf16-mixed), or use ddp"
        )
