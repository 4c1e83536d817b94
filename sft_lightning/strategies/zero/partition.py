"""Cutting a loaded model into ZeRO-3's partitions before DeepSpeed's engine is made.

The engine would move the whole model to every device first. Cut up parameter by parameter, none holds more than one of
them whole (`deepspeed.zero.Init` on a module; Rajbhandari et al., 2019, arXiv:1910.02054).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sft_lightning.compat.peft import weights_read_by_dora

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Blocks of a DeepSpeed configuration → the type that its engine casts weights to."""


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has cut a parameter up."""
    return hasattr(parameter, "ds_id")


def keep_what_is_sent(module: nn.Module, config: Mapping[str, Any]) -> None:
    """Leave the weights to rank 0, which sends them when they are partitioned, in the type that they train in.

    The others give their memory back, and take it again for one parameter at a time.

    Args:
        module: Loaded, alike in all processes; what is partitioned already is left alone.
        config: DeepSpeed's.
    """
    half = _half_precision(config)
    for parameter in _not_partitioned(module):
        dtype = half if half is not None and parameter.is_floating_point() else parameter.dtype
        if dist.get_rank():
            parameter.data = torch.empty_like(parameter.data, dtype=dtype)
        else:
            parameter.data = parameter.data.to(dtype)


def partition_model(module: nn.Module, config: Mapping[str, Any], device: torch.device) -> None:
    """Leave every process its part of every parameter; all processes call this, and rank 0's weights are taken.

    Args:
        module: As `keep_what_is_sent` left it; what is partitioned already is left alone.
        config: DeepSpeed's.
        device: Where the process computes: buffers are moved there, and parts unless they are offloaded.
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


def own_part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """Cut out what ZeRO-3 gives this process of a tensor, which it fills up with zeros to divide it evenly."""
    size, group = parameter.ds_tensor.ds_numel, parameter.ds_process_group
    padding = size * dist.get_world_size(group) - value.numel()
    padded = nn.functional.pad(value.flatten(), (0, padding))
    return padded.narrow(0, size * dist.get_rank(group), size)


def load_part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """Put this process's part of a whole tensor into a partitioned parameter; return what loading then finds to do.

    Args:
        parameter: It, or one that is not partitioned, or `None` where a name has none.
        value: The same whole tensor in every process.
    """
    if parameter is None or not is_partitioned(parameter):
        return value
    with _part_in_memory(parameter) as part:
        part.copy_(own_part(parameter, value))
    nothing: torch.Tensor = parameter.data
    return nothing


@contextmanager
def _part_in_memory(parameter: Any) -> Iterator[torch.Tensor]:
    """Have this process's part of a parameter in memory, and write it back if it is from NVMe."""
    on_nvme = parameter.ds_tensor.final_location == "nvme"
    if on_nvme:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    yield parameter.ds_tensor.data
    if on_nvme:
        parameter.nvme_swapper.swap_out_and_release([parameter])


def _is_whole(parameter: Any) -> bool:
    """Whether a partitioned parameter is gathered at the moment."""
    return str(parameter.ds_status.name) == "AVAILABLE"


@contextmanager
def gathered_in_forward(module: nn.Module) -> Iterator[None]:
    """Let forward passes run before DeepSpeed's engine does this: the weights a module uses are whole while it runs."""
    gathered: Any = importlib.import_module("deepspeed").zero.GatheredParameters
    open_contexts: list[Any] = []

    def gather(owner: nn.Module, args: Any) -> None:
        used = [*owner.parameters(recurse=False), *external_weights(owner)]
        cut_up = [parameter for parameter in used if is_partitioned(parameter) and not _is_whole(parameter)]
        open_contexts.append(gathered(cut_up, enabled=bool(cut_up)))
        open_contexts[-1].__enter__()

    def cut(owner: nn.Module, args: Any, output: Any) -> None:
        open_contexts.pop().__exit__(None, None, None)

    hooks = []
    for each in module.modules():
        hooks += [each.register_forward_pre_hook(gather), each.register_forward_hook(cut, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def name_external_weights(model: nn.Module) -> None:
    """Let ZeRO-3 gather for every module, beside its own weights, those that it uses of others.

    Those are weights in a list or a dict of parameters, which is a module that never runs (PEFT keeps those of IA3,
    VeRA and of LoRA on embeddings so); and what DoRA takes the norms of (Liu et al., 2024, arXiv:2402.09353).
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


def external_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights that a module uses though they are another's, where DeepSpeed has been told so."""
    registered: dict[int, nn.Parameter] = getattr(module, "_external_params", {})
    return list(registered.values())
