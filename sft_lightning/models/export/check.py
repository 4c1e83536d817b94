"""Load an exported adapter again with PEFT, and compare its logits with the live model's.

The base is not loaded a second time: a copy of the live model without its adapter shares every tensor with it, and PEFT
puts the exported adapter on this copy. The check does not change training: weights, `requires_grad`, modes and random
generators stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from sft_lightning.compat.peft import module_under_adapter
from sft_lightning.compat.torch import change_class, copy_sharing_tensors
from sft_lightning.models.adapters.folder import CHANGE_BASE, attach_adapter, read_config
from sft_lightning.models.adapters.quantized import prepare_adapted
from sft_lightning.models.inspection import evaluating
from sft_lightning.models.probing import logits_of


def copy_without_adapters(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a module tree that has no adapters and shares all tensors with the original.

    Later changes to the structure of the copy, such as a new adapter, do not change the original.
    """
    return _copy_without_adapters(module, {})


def _copy_without_adapters(module: torch.nn.Module, copies: dict[int, torch.nn.Module]) -> torch.nn.Module:
    inner = module_under_adapter(module)
    if inner is not None:
        return _copy_without_adapters(inner, copies)
    if id(module) not in copies:
        copied = copy_sharing_tensors(module, lambda child: _copy_without_adapters(child, copies))
        vars(copied).pop("peft_config", None)
        copies[id(module)] = copied
    return copies[id(module)]


def export_difference(
    model: PeftModel,
    folder: Path,
    input_ids: torch.Tensor,
    *,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[float, float]:
    """Compare the logits of the live model with those of its base under an exported adapter.

    Args:
        model: The live model.
        folder: The exported adapter.
        input_ids: Token ids, (B, S).
        precision: Makes the context of the forward passes, such as autocast.

    Returns:
        The largest absolute difference between two logits, and the largest absolute logit.

    Raises:
        AdapterError: If the folder's tensors do not match its configuration.
    """
    with _undisturbed(model):
        with precision():
            live = logits_of(model, input_ids)
        config = read_config(folder)
        if getattr(config, "init_lora_weights", None) in CHANGE_BASE:
            config.init_lora_weights = True  # the live base has already been changed by it
        base = copy_without_adapters(model.get_base_model())
        reloaded = attach_adapter(base, folder, config=config, prepare=prepare_adapted)
        _compute_alike(reloaded, model)
        with precision():
            exported = logits_of(reloaded.eval(), input_ids)
    return float((live - exported).abs().max()), float(live.abs().max())


def _compute_alike(reloaded: torch.nn.Module, model: torch.nn.Module) -> None:
    """Give the reloaded adapter the live one's types and forward passes, so that only weights can make a difference.

    PEFT loads it in float32, `trainer.precision: bf16-true` trains it in bfloat16. Nothing is rounded, because it was
    written in the live type.
    """
    classes = {name: type(module) for name, module in model.named_modules()}
    for name, module in reloaded.named_modules():
        if issubclass(classes.get(name, object), type(module)):
            change_class(module, classes[name])  # `FusedLinear` for PEFT's `Linear`
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, parameter in reloaded.named_parameters():
        if parameter.dtype != types.get(name, parameter.dtype):
            parameter.data = parameter.data.to(types[name])


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode; afterwards restore modes, `requires_grad` and random generators."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with evaluating(model), torch.random.fork_rng():
            yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad = requires_grad
