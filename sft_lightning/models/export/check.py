"""An exported adapter, put on the live base as whoever loads it will: the answers must be the live model's.

The base is not loaded a second time. A twin of the live model shares every tensor with it, without the adapter; PEFT
puts the exported one on the twin. The live model's training is as if nothing had happened: weights, which of them
train, modes and random generators are left as they were.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from sft_lightning.models.adapters.folder import CHANGE_BASE, attach_adapter, read_config
from sft_lightning.models.adapters.quantized import prepare_adapted
from sft_lightning.models.inspection import evaluating
from sft_lightning.models.probing import logits_of


def bare_twin(module: torch.nn.Module, twins: dict[int, torch.nn.Module] | None = None) -> torch.nn.Module:
    """Return a module tree with the same tensors, without adapters; what is changed in its structure stays in it."""
    twins = {} if twins is None else twins
    if isinstance(module, BaseTunerLayer):
        return bare_twin(module.get_base_layer(), twins)
    if isinstance(module, AuxiliaryTrainingWrapper):
        return bare_twin(module.original_module, twins)
    if id(module) not in twins:
        twin = copy.copy(module)
        twins[id(module)] = twin
        for name, value in vars(module).items():
            if isinstance(value, dict):  # parameters, buffers, modules, hooks
                twin.__dict__[name] = OrderedDict(value) if isinstance(value, OrderedDict) else dict(value)
        twin.__dict__.pop("peft_config", None)
        twin._modules = {
            name: None if child is None else bare_twin(child, twins) for name, child in module._modules.items()
        }
    return twins[id(module)]


def export_difference(
    model: PeftModel,
    folder: Path,
    input_ids: torch.Tensor,
    *,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[float, float]:
    """Compare the live model's answers with those of its base under an exported adapter.

    Args:
        model: The live model.
        folder: The exported adapter.
        input_ids: (B, S) token ids.
        precision: What the models are asked in, such as autocast.

    Returns:
        The largest difference between two logits, and the largest absolute logit.

    Raises:
        UserError: If the folder's tensors are not those that its configuration asks for.
    """
    with _undisturbed(model):
        with precision():
            live = logits_of(model, input_ids)
        config = read_config(folder)
        if getattr(config, "init_lora_weights", None) in CHANGE_BASE:
            config.init_lora_weights = True  # the live base has already been changed by it
        twin = attach_adapter(bare_twin(model.get_base_model()), folder, config=config, prepare=prepare_adapted)
        _compute_alike(twin, model)
        with precision():
            exported = logits_of(twin.eval(), input_ids)
    return float((live - exported).abs().max()), float(live.abs().max())


def _compute_alike(twin: torch.nn.Module, model: torch.nn.Module) -> None:
    """Give the twin's adapter the live one's types: PEFT loads it in float32, `trainer.precision: bf16-true` trains it
    in bfloat16. Nothing is rounded, because it was written in the live type."""
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, parameter in twin.named_parameters():
        if parameter.dtype != types.get(name, parameter.dtype):
            parameter.data = parameter.data.to(types[name])


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards modes, `requires_grad` and random generators are what they were."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with evaluating(model), torch.random.fork_rng():
            yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad = requires_grad
