"""Partition a loaded model for ZeRO-3 before DeepSpeed's engine is made.

The engine would first move the full model to every device. Partitioned parameter by parameter, a device holds at most
one full parameter at a time (`deepspeed.zero.Init` on a module; Rajbhandari et al., 2019, arXiv:1910.02054).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sft_lightning.compat.deepspeed import (
    cut_own_part,
    external_weights,
    is_gathered,
    is_partitioned,
    own_part_in_memory,
)
from sft_lightning.compat.peft import weights_read_by_dora

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Blocks of a DeepSpeed configuration → the type that its engine casts weights to."""


def keep_weights_on_rank_0(module: nn.Module, config: Mapping[str, Any]) -> None:
    """Convert the weights to the training type on rank 0, which sends them, and free them in the other processes.

    The other processes have empty tensors of the same shapes, whose memory is taken one parameter at a time when they
    are partitioned.

    Args:
        module: A loaded module, the same in all processes; partitioned parameters stay as they are.
        config: DeepSpeed's configuration.
    """
    half = _half_precision(config)
    for parameter in _not_partitioned(module):
        dtype = half if half is not None and parameter.is_floating_point() else parameter.dtype
        if dist.get_rank():
            parameter.data = torch.empty_like(parameter.data, dtype=dtype)
        else:
            parameter.data = parameter.data.to(dtype)


def partition_model(module: nn.Module, config: Mapping[str, Any], device: torch.device) -> None:
    """Send every process its part of every parameter of rank 0; every process must call this.

    Args:
        module: A module from `keep_weights_on_rank_0`; partitioned parameters stay as they are.
        config: DeepSpeed's configuration.
        device: Where this process computes: buffers are moved there, and parts unless they are offloaded.
    """
    if not _not_partitioned(module):
        return
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    zero: Any = importlib.import_module("deepspeed").zero
    zero.Init(module=module, config_dict_or_path=config, dtype=_half_precision(config))


def _not_partitioned(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if not is_partitioned(parameter)]


def _half_precision(config: Mapping[str, Any]) -> torch.dtype | None:
    return next((dtype for block, dtype in _HALF.items() if config.get(block, {}).get("enabled") is True), None)


def load_part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """Copy this process's part of a full tensor into a partitioned parameter.

    Args:
        parameter: A parameter, partitioned or not, or `None` if the module has none of the name.
        value: The same full tensor in every process, in the shape of the parameter.

    Returns:
        The tensor for `load_state_dict`: the empty one that a partitioned parameter has, otherwise `value`.
    """
    if parameter is None or not is_partitioned(parameter):
        return value
    with own_part_in_memory(parameter) as part:
        part.copy_(cut_own_part(parameter, value))
    empty: torch.Tensor = parameter.data
    return empty


@contextmanager
def gathered_in_forward(module: nn.Module) -> Iterator[None]:
    """Gather the weights of each module while it runs, for forward passes before DeepSpeed's engine exists."""
    gathered: Any = importlib.import_module("deepspeed").zero.GatheredParameters
    open_contexts: list[Any] = []

    def gather(owner: nn.Module, args: Any) -> None:
        used = [*owner.parameters(recurse=False), *external_weights(owner)]
        partitioned = [parameter for parameter in used if is_partitioned(parameter) and not is_gathered(parameter)]
        open_contexts.append(gathered(partitioned, enabled=bool(partitioned)))
        open_contexts[-1].__enter__()

    def release(owner: nn.Module, args: Any, output: Any) -> None:
        open_contexts.pop().__exit__(None, None, None)

    hooks = []
    for each in module.modules():
        hooks += [each.register_forward_pre_hook(gather), each.register_forward_hook(release, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def register_external_weights(model: nn.Module) -> None:
    """Make ZeRO-3 gather for every module, beside its own weights, the weights of other modules that it reads.

    Those are weights in parameter lists and dicts, which are modules that never run (PEFT keeps the weights of IA3,
    VeRA and LoRA on embeddings in them), and the weights whose norms DoRA takes (Liu et al., 2024, arXiv:2402.09353).
    """
    register: Any = importlib.import_module("deepspeed").zero.register_external_parameter
    for module in model.modules():
        for weight in _in_collections(module):
            register(module, weight)
        for dora, weight in weights_read_by_dora(module):
            register(dora, weight)


def _in_collections(module: nn.Module) -> Iterator[nn.Parameter]:
    for child in module.children():
        if isinstance(child, nn.ParameterDict | nn.ParameterList):
            yield from child.parameters()
