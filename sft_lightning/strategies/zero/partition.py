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


def load_part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """Put this process's part of a whole tensor into a partitioned parameter; return what loading then finds to do.

    Args:
        parameter: It, or one that is not partitioned, or `None` where a name has none.
        value: The same whole tensor in every process.
    """
    if parameter is None or not is_partitioned(parameter):
        return value
    with own_part_in_memory(parameter) as part:
        part.copy_(cut_own_part(parameter, value))
    nothing: torch.Tensor = parameter.data
    return nothing


@contextmanager
def gathered_in_forward(module: nn.Module) -> Iterator[None]:
    """Let forward passes run before DeepSpeed's engine does this: the weights a module uses are whole while it runs."""
    gathered: Any = importlib.import_module("deepspeed").zero.GatheredParameters
    open_contexts: list[Any] = []

    def gather(owner: nn.Module, args: Any) -> None:
        used = [*owner.parameters(recurse=False), *external_weights(owner)]
        cut_up = [parameter for parameter in used if is_partitioned(parameter) and not is_gathered(parameter)]
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
