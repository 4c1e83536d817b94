"""Merge an adapter into one weight of the base at a time, with the arithmetic of PEFT's own layers.

PEFT wraps a model whose weights take no memory: each is a single zero, expanded to its shape. A real weight is put
into its layer, merged there by PEFT, and taken out again.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sft_lightning.compat.peft import (
    adapts_parameter,
    changes_bias,
    merge_into_weight,
    module_saved_in_full,
    module_under_adapter,
    token_adapter_of,
)
from sft_lightning.models.adapters.folder import (
    CHANGE_BASE,
    attach_adapter,
    base_tensors,
    method_name,
    read_config,
    read_weights,
)

ADAPTER = "default"
_LAYER_BY_LAYER = ("LORA", "IA3", "LOHA", "LOKR")


def empty_model(config: PretrainedConfig, *, vocab_size: int, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a model whose float32 weights are all zero and take no memory; tied weights are one parameter.

    Args:
        config: The base's configuration.
        vocab_size: Rows of the embeddings.
        trust_remote_code: Run code that comes with the model.
    """
    config = copy.deepcopy(config)
    config.get_text_config().vocab_size = vocab_size
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code, attn_implementation="eager"
        )
    zeros: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            zero = torch.zeros(1).expand(parameter.shape)
            module.register_parameter(name, zeros.setdefault(id(parameter), torch.nn.Parameter(zero, False)))
    return model  # type: ignore[no-any-return]


def tied_parameter_names(model: torch.nn.Module) -> list[list[str]]:
    """Return groups of names that share one parameter, each in the order of the model's modules."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [group for group in names.values() if len(group) > 1]


def reason_for_whole_model(folder: Path) -> str | None:
    """Return why an adapter can only be merged into the whole model; `None` if weight by weight is possible."""
    config = read_config(folder)
    kind = method_name(config)
    if kind not in _LAYER_BY_LAYER:
        return f"PEFT merges {kind} adapters only into the whole model"
    if getattr(config, "init_lora_weights", None) in CHANGE_BASE:
        return f"init_lora_weights {config.init_lora_weights!r} changes the base before the update is added"
    for option in ("target_parameters", "layer_replication"):
        if getattr(config, option, None):
            return f"{option} changes more than one weight at a time"
    return None


class LayerMerger:
    """Merges one adapter into weights that are given one by one.

    Args:
        model: From `empty_model`; changed in place.
        folder: The adapter's folder.

    Raises:
        UserError: If the adapter does not fit the model.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.ties = bool(getattr(read_config(folder), "ensure_weight_tying", False))
        """Whether tied weights were trained as one."""

        ties = tied_parameter_names(model)
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        candidates = base_tensors(read_weights(folder), model)
        for name in candidates:  # PEFT copies them into the model, which needs memory of its own for them
            parameter = model.get_parameter(name)
            parameter.data = torch.zeros(parameter.shape)
        self._model: PeftModel = attach_adapter(model, folder)
        self._replaced = {name: tensor for name, tensor in candidates.items() if not self._is_saved(name)}
        for name in list(self._replaced):  # a value that is loaded under one name of a tied weight is loaded under all
            for other in (other for group in ties if name in group for other in group if not self._is_saved(other)):
                self._replaced.setdefault(other, self._replaced[name])
        self.changed = {name for name in names if self._changes(name)}
        """Names of the base's parameters that the adapter changes."""

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a base weight with the adapter merged into it, in float32 and of the same shape.

        Args:
            name: One of `changed`.
            weight: The base's value in float32, in the shape of the parameter.
        """
        weight = self._replaced[name].float() if name in self._replaced else weight
        module, attribute = self._find(name)
        saved = module_saved_in_full(module, ADAPTER)
        if saved is None:
            module = token_adapter_of(module) or module
            if isinstance(module, BaseTunerLayer):
                return merge_into_weight(module, ADAPTER, attribute, weight)
            if name in self._replaced:
                return weight
        trained: torch.Tensor = getattr(saved or module, attribute)  # of a module that was saved in full, or inside one
        return trained.detach().float()

    def _changes(self, name: str) -> bool:
        if name in self._replaced:
            return True
        module, attribute = self._find(name)
        if adapts_parameter(module):
            raise TypeError(f"{name}: {type(module).__name__} can only be merged into the whole model")
        if isinstance(module, BaseTunerLayer):
            return attribute == "weight" or changes_bias(module, ADAPTER)
        return token_adapter_of(module) is not None or self._is_saved(name)

    def _is_saved(self, name: str) -> bool:
        """Whether a parameter belongs to a module that was saved in full (`modules_to_save`)."""
        module: Any = self._model.get_base_model()
        for part in name.split(".")[:-1]:
            module = _unwrap(module).get_submodule(part)
            if module_saved_in_full(module, ADAPTER) is not None:
                return True
        return False

    def _find(self, name: str) -> tuple[torch.nn.Module, str]:
        """Return the module that owns a base parameter, or PEFT's wrapper around it, and the parameter's name there."""
        *path, attribute = name.split(".")
        module: Any = self._model.get_base_model()
        for part in path:
            module = _unwrap(module).get_submodule(part)
        return module, attribute


def _unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module that trains inside a wrapper of PEFT, or the base's own."""
    return module_saved_in_full(module, ADAPTER) or module_under_adapter(module) or module
