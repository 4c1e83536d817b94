"""Full tensors from shards and shards from full tensors: checkpoints do not depend on the number of processes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from sft_lightning.compat.deepspeed import is_partitioned


def gather_parameters(module: nn.Module, *, keep: bool, trainable_only: bool) -> dict[str, torch.Tensor]:
    """Gather parameters one by one; every process must call this.

    Args:
        module: A module whose parameters may be DTensors, or partitioned by ZeRO-3.
        keep: Keep the gathered parameters in this process. The other processes take part and drop them, so that a
            machine holds one copy.
        trainable_only: Skip frozen parameters.

    Returns:
        Name → full tensor on the CPU, in the shape of the parameter; empty without `keep`.
    """
    reshard(module)
    gathered = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or not trainable_only:
            full = _full_tensor(parameter)
            if keep:
                gathered[name] = full.cpu()
    return gathered


def reshard(module: nn.Module) -> None:
    """Free the parameters that FSDP2 has gathered; its outermost group stays gathered after a forward pass."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def _full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    if is_partitioned(tensor):
        zero = importlib.import_module("deepspeed").zero
        with zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def full_parameters(module: nn.Module, full: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Replace shards by full parameters while the context is open, so that the model can be saved.

    No forward pass may run inside.

    Args:
        module: The module that `gather_parameters` was called on.
        full: Its result, or a part of it: name → full tensor. An empty mapping changes nothing.
    """
    reshard(module)
    sharded = dict(module.named_parameters())
    replacements = {id(sharded[name]): _parameter(tensor, sharded[name]) for name, tensor in full.items()}
    places = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in replacements
    ]
    for owner, name, parameter in places:
        owner.register_parameter(name, replacements[id(parameter)])
    try:
        yield
    finally:
        for owner, name, parameter in places:
            owner.register_parameter(name, parameter)


def _parameter(tensor: torch.Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=like.requires_grad)


def gather_optimizer_state(optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
    """Return an optimizer's state dict with full tensors, as a single process has it; every process must call this.

    Args:
        optimizer: An optimizer whose parameters may be DTensors.
        keep: Keep the state in this process. The other processes take part and get an empty dict.
    """
    state = optimizer.state_dict()
    gathered = {}
    for index, values in state["state"].items():
        full = {key: _full_tensor(value) if isinstance(value, torch.Tensor) else value for key, value in values.items()}
        if keep:
            gathered[index] = {
                key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in full.items()
            }
    return {**state, "state": gathered} if keep else {}


def shard_optimizer_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state dict with each tensor sharded as its parameter is; needs no communication.

    Args:
        state: State dict with full tensors, from `gather_optimizer_state` or a single process.
        optimizer: The optimizer that will load it.

    Raises:
        RuntimeError: If it has another number of parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharded = {
        index: {key: shard_like(parameter, value) for key, value in state["state"][index].items()}
        for parameter, index in indices_in_state(state, parameters).items()
        if index in state["state"]
    }
    return {**state, "state": sharded}


def indices_in_state(state: Mapping[str, Any], parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, int]:
    """Return the index that each parameter has in an optimizer's state dict.

    Args:
        state: The state dict.
        parameters: Parameters of all groups of the optimizer, in order.

    Raises:
        RuntimeError: If the state dict has another number of parameters.
    """
    indices = [index for group in state["param_groups"] for index in group["params"]]
    if len(indices) != len(parameters):
        raise RuntimeError(
            f"the optimizer in the checkpoint has {len(indices)} parameters, but this run trains {len(parameters)}"
        )
    return dict(zip(parameters, indices, strict=True))


def shard_like(parameter: torch.Tensor, value: Any) -> Any:
    """Shard a tensor as the DTensor of the same shape that it belongs to; return any other value unchanged.

    Args:
        parameter: The parameter that the value belongs to.
        value: The same full tensor in every process, or another value, such as a step count.
    """
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor) or not isinstance(value, torch.Tensor):
        return value
    if value.shape != parameter.shape:
        return value
    local = parameter.to_local()
    return distribute_tensor(value.to(local.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
