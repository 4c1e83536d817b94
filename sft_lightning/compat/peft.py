"""Undocumented parts of PEFT's layers and wrappers that we use."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from sft_lightning.compat.names import uses

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

_LAYER = "peft.tuners.tuners_utils"
_WRAPPERS = "peft.utils.other"


@uses(
    f"{_LAYER}:BaseTunerLayer.get_base_layer",
    f"{_WRAPPERS}:AuxiliaryTrainingWrapper",
    feature="exporting an adapter, and checking the export",
    since="0.15",
    replacement="`PeftModel.unload` on a copy of the model, which doubles its memory",
)
def module_under_adapter(module: torch.nn.Module) -> torch.nn.Module | None:
    """Return the base's module inside a layer or wrapper of PEFT; `None` for any other module."""
    found: Any = module
    if isinstance(module, importlib.import_module(_LAYER).BaseTunerLayer):
        return cast("torch.nn.Module", found.get_base_layer())
    if isinstance(module, importlib.import_module(_WRAPPERS).AuxiliaryTrainingWrapper):
        return cast("torch.nn.Module", found.original_module)
    return None


@uses(
    f"{_WRAPPERS}:ModulesToSaveWrapper.active_adapters",
    feature="model.adapter.modules_to_save",
    since="0.15",
    replacement="`wrapper.modules_to_save` alone, which holds one module for each adapter",
)
def module_saved_in_full(module: torch.nn.Module | None, adapter: str | None = None) -> torch.nn.Module | None:
    """Return the copy of a module that trains in full (`modules_to_save`); `None` if there is none.

    Args:
        module: Any module of a PEFT model.
        adapter: Whose copy; default: the active adapter's.
    """
    found: Any = module
    if not isinstance(module, importlib.import_module(_WRAPPERS).ModulesToSaveWrapper):
        return None
    return cast("torch.nn.Module", found.modules_to_save[adapter or found.active_adapters[0]])


@uses(
    f"{_WRAPPERS}:TrainableTokensWrapper.original_module",
    feature="merge of an adapter with trainable_token_indices",
    since="0.15",
    replacement="merging with the whole model in memory",
)
def token_adapter_of(module: torch.nn.Module) -> torch.nn.Module | None:
    """Return the layer that holds an embedding's trainable rows; `None` if the embedding has none."""
    found: Any = module
    is_wrapper = isinstance(module, importlib.import_module(_WRAPPERS).TrainableTokensWrapper)
    return cast("torch.nn.Module", found.token_adapter) if is_wrapper else None


@uses(
    "peft.tuners.lora.layer:ParamWrapper",
    feature="merge",
    since="0.17",
    replacement="merging with the whole model in memory",
)
def adapts_parameter(module: torch.nn.Module) -> bool:
    """Whether a LoRA layer adapts a parameter of a module (`target_parameters`) instead of the module."""
    return isinstance(module, importlib.import_module("peft.tuners.lora.layer").ParamWrapper)


@uses(
    f"{_LAYER}:BaseTunerLayer.merge",
    f"{_LAYER}:BaseTunerLayer.merged_adapters",
    feature="merge",
    since="0.8",
    replacement="merging with the whole model in memory",
)
def merge_into_weight(layer: Any, adapter: str, attribute: str, weight: torch.Tensor) -> torch.Tensor:
    """Merge an adapter into one weight with a layer of PEFT; the layer's other parameters are zero meanwhile.

    Args:
        layer: The layer; afterwards it is as it was.
        adapter: Its adapter.
        attribute: Name of the base layer's parameter that the weight is for.
        weight: In the shape of that parameter.

    Returns:
        The merged weight, float32, in the same shape.
    """
    import torch

    base = layer.get_base_layer()
    own = {name: parameter.data for name, parameter in base.named_parameters(recurse=False)}
    try:
        for name, parameter in base.named_parameters(recurse=False):
            parameter.data = weight.clone() if name == attribute else torch.zeros(parameter.shape)
        layer.merge(adapter_names=[adapter])
        merged: torch.Tensor = getattr(layer.get_base_layer(), attribute).data
    finally:
        layer.merged_adapters.clear()  # the layer would refuse to merge a second time
        for name, parameter in base.named_parameters(recurse=False):
            parameter.data = own[name]
    return merged.float()


@uses(
    feature="merge",
    since="0.14",
    replacement="merging with the whole model in memory",
)
def changes_bias(layer: Any, adapter: str) -> bool:
    """Whether merging a layer changes the base's bias: with `lora_bias`, or with a method other than LoRA.

    Args:
        layer: A layer of PEFT.
        adapter: Its adapter.
    """
    return not hasattr(layer, "lora_bias") or bool(layer.lora_bias.get(adapter))


@uses(
    "peft.mapping:PEFT_TYPE_TO_PREFIX_MAPPING",
    feature="model.adapter.only_adapter: false",
    since="0.15",
    replacement="the names that `get_peft_model_state_dict` returns",
)
def adapter_name_parts(model: PeftModel) -> tuple[str, ...]:
    """Return the parts, such as `lora_`, that the names of adapter parameters contain and those of the base do not."""
    prefixes = importlib.import_module("peft.mapping").PEFT_TYPE_TO_PREFIX_MAPPING
    prefix = prefixes.get(model.active_peft_config.peft_type, "")
    return tuple(part for part in (prefix, "modules_to_save.", "trainable_tokens_") if part)


@uses(
    feature="model.adapter.only_adapter: false",
    since="0.8",
    replacement="`module_under_adapter` on every module",
)
def is_replaced_by_adapter(name: str) -> bool:
    """Whether a parameter of a PEFT model, by its name, is a base weight that has an adapter or a trained copy."""
    return name.endswith(".base_layer.weight") or ".original_module." in name


@uses(
    feature="model.adapter.use_dora under trainer.strategy: deepspeed_stage_3",
    since="0.10",
    replacement="the documented `get_base_layer`, and a forward pass that records which weights are read",
)
def weights_read_by_dora(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, torch.nn.Parameter]]:
    """Yield the DoRA modules of a LoRA layer, each with the weights of other modules whose norms it computes.

    Those are the base's and the two low-rank ones (peft/tuners/lora/dora.py; Liu et al., 2024,
    arXiv:2402.09353).
    """
    import torch

    layer: Any = module
    magnitudes = getattr(module, "lora_magnitude_vector", None)
    for name, dora in magnitudes.items() if isinstance(magnitudes, torch.nn.ModuleDict) else ():
        yield dora, layer.get_base_layer().weight
        if name in layer.lora_A:
            yield from ((dora, low_rank[name].weight) for low_rank in (layer.lora_A, layer.lora_B))
        else:
            yield from ((dora, low_rank[name]) for low_rank in (layer.lora_embedding_A, layer.lora_embedding_B))
