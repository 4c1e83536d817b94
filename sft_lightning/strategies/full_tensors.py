"""Whole tensors from shards and shards from whole tensors, so that a checkpoint is the same however many wrote it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from sft_lightning.compat.deepspeed import is_partitioned


def gather_parameters(module: nn.Module, *, keep: bool, trainable_only: bool) -> dict[str, torch.Tensor]:
    """Gather parameters one after the other; every process must call this.

    Args:
        module: A module whose parameters may be DTensors, or partitioned by ZeRO-3.
        keep: Whether this process wants them; another takes part and gets nothing, so that one host holds one copy.
        trainable_only: Leave frozen ones where they are.

    Returns:
        Name → whole tensor on the CPU; empty without `keep`.
    """
    reshard(module)
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or not trainable_only:
            whole = _whole(parameter)
            if keep:
                found[name] = whole.cpu()
    return found


def reshard(module: nn.Module) -> None:
    """Drop gathered parameters: the outermost group stays gathered after a forward pass."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    if is_partitioned(tensor):
        zero = importlib.import_module("deepspeed").zero
        with zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def full_parameters(module: nn.Module, full: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put whole parameters in the place of shards, for whoever saves the model; afterwards the shards are back.

    No forward pass may run inside.

    Args:
        module: The module that `gather_parameters` was called on.
        full: Its result, or a part of it; empty changes nothing.
    """
    reshard(module)
    sharded = dict(module.named_parameters())
    stand_ins = {id(sharded[name]): _parameter(tensor, sharded[name]) for name, tensor in full.items()}
    places = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in stand_ins
    ]
    for owner, name, parameter in places:
        owner.register_parameter(name, stand_ins[id(parameter)])
    try:
        yield
    finally:
        for owner, name, parameter in places:
            owner.register_parameter(name, parameter)


def _parameter(tensor: torch.Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=like.requires_grad)


def gather_optimizer_state(optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
    """Return an optimizer's state dict with whole tensors, as a single process has it; every process must call this.

    Args:
        optimizer: Over parameters that may be DTensors.
        keep: Whether this process wants it; another takes part and gets an empty dict.
    """
    state = optimizer.state_dict()
    gathered = {}
    for index, values in state["state"].items():
        whole = {key: _whole(value) if isinstance(value, torch.Tensor) else value for key, value in values.items()}
        if keep:
            gathered[index] = {
                key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in whole.items()
            }
    return {**state, "state": gathered} if keep else {}


def shard_optimizer_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return a state dict of whole tensors with each sharded as its parameter is; needs no communication.

    Args:
        state: From `gather_optimizer_state`, or of a single process.
        optimizer: Over the parameters that the state belongs to.

    Raises:
        RuntimeError: If it is the state of another number of parameters.
    """
    indices = [index for group in state["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(indices) != len(parameters):
        raise RuntimeError(
            f"the checkpoint's optimizer has {len(indices)} parameters, and this run's has {len(parameters)}"
        )
    sharded = {
        index: {key: shard_like(parameter, value) for key, value in state["state"][index].items()}
        for index, parameter in zip(indices, parameters, strict=True)
        if index in state["state"]
    }
    return {**state, "state": sharded}


def shard_like(parameter: torch.Tensor, value: Any) -> Any:
    """Shard a tensor of a DTensor's shape as that is; return anything else as it is.

    Args:
        parameter: The parameter that the value belongs to.
        value: The same whole tensor in every process, or something else, such as a step count.
    """
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor) or not isinstance(value, torch.Tensor):
        return value
    if value.shape != parameter.shape:
        return value
    local = parameter.to_local()
    return distribute_tensor(value.to(local.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
