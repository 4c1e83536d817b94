"""What is stored and what trains: as many bits as were asked for, and PEFT's tensors in every layer alike."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import peft
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import PeftModel
from transformers.pytorch_utils import Conv1D

from sft_lightning.checks import Check
from sft_lightning.models.inspection import base_model, bypassed_modules, has_virtual_tokens, is_sharded
from sft_lightning.training.checks.hooks import RunCheck

if TYPE_CHECKING:
    from sft_lightning.training.module import CausalLMModule

_STORAGE = "quantized layers"
_TRAINED = "adapted layers"


class Storage(RunCheck):
    """Check the storage of the base's layers and the tensors of the adapter, before the first step."""

    def on_fit_start(self, module: CausalLMModule) -> None:
        """Look at the loaded model, before its layers are compiled."""
        quantization = module.spec.quantization
        bits = None if quantization is None else quantization.bits
        module.checks.run(lambda: check_storage(module.language_model, bits))
        module.checks.run(lambda: check_adapted(module.language_model))


def check_storage(model: Any, bits: int | None) -> Check:
    """Check that the layers of the base are stored in the bits that were asked for.

    Layers outside the numbered decoder layers, such as the head, and those whose weights a family reads itself, are not
    quantized. Nor are layers of a kind that transformers never quantizes; but then all of the kind are not.

    Args:
        model: The model, adapter included.
        bits: `model.quantization.bits`; `None` without quantization.
    """
    layers = _linear_layers(model)
    quantized = {name: layer for name, layer in layers.items() if isinstance(layer, Linear4bit | Linear8bitLt)}
    if bits is None:
        figure = f"{len(quantized)} layers are quantized, none is asked for"
        return Check(_STORAGE, not quantized, figure)
    if is_sharded(model):
        return Check(_STORAGE, None, "the weights are divided between processes")
    if not quantized:
        return Check(_STORAGE, False, f"no layer is quantized (model.quantization.bits: {bits})")
    kinds = {_kind(name) for name in quantized}
    skipped = bypassed_modules(base_model(model).config)
    plain = [name for name in layers.keys() - quantized.keys() if _kind(name) in kinds and _last(name) not in skipped]
    if plain:
        figure = f"{len(plain)} layers are not quantized, unlike others of their kind: {min(plain)}"
        return Check(_STORAGE, False, figure)
    wrong = [name for name, layer in quantized.items() if _stored_bytes(layer) != _asked_bytes(layer, bits)]
    if wrong:
        layer = quantized[wrong[0]]
        figure = f"{wrong[0]} takes {_stored_bytes(layer)} bytes, {_asked_bytes(layer, bits)} in {bits} bits"
        return Check(_STORAGE, False, figure)
    parameters = {name: layer.in_features * layer.out_features for name, layer in quantized.items()}
    left = {name: layer.weight.numel() for name, layer in layers.items() if name not in quantized}
    figure = f"{len(quantized)} layers in {bits} bits, {sum(parameters.values())} weights; {len(left)} others"
    return Check(_STORAGE, True, figure)


def _linear_layers(model: Any) -> dict[str, Any]:
    """Return the base's linear layers by name, those under an adapter included, without the adapter's own."""
    base = base_model(model)
    found = {}
    for name, layer in base.named_modules():
        own = re.search(r"\.(lora_|ia3_|modules_to_save|original_module)", f".{name}")
        if isinstance(layer, torch.nn.Linear | Conv1D) and own is None and hasattr(layer, "weight"):
            found[name.replace(".base_layer", "")] = layer
    return found


def _stored_bytes(layer: Any) -> int:
    return int(layer.weight.numel() * layer.weight.element_size())


def _asked_bytes(layer: Any, bits: int) -> int:
    return int(-(-layer.in_features * layer.out_features * bits // 8))


def _kind(layer: str) -> str:
    """Return a layer's name without its numbers."""
    return re.sub(r"\.\d+\b", ".N", layer)


def _last(layer: str) -> str:
    return layer.rpartition(".")[2]


def check_adapted(model: Any) -> Check:
    """Check that PEFT's layers of one kind have their adapter on, not merged, and train alike.

    Args:
        model: The model, adapter included.
    """
    if not isinstance(model, PeftModel):
        return Check(_TRAINED, None, "there is no adapter")
    if has_virtual_tokens(model):
        return Check(_TRAINED, None, "the adapter is not in layers")
    states = {status.name: status for status in peft.get_layer_status(model)}
    wrong = [name for name, status in states.items() if not status.enabled or status.merged_adapters]
    if wrong:
        return Check(_TRAINED, False, f"the adapter is off in {len(wrong)} layers, or merged: {wrong[0]} …")
    apart = layers_apart({name: str(sorted(status.requires_grad.items())) for name, status in states.items()})
    if apart:
        return Check(_TRAINED, False, f"{len(apart)} layers do not train as others of their kind do: {apart[0]} …")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return Check(_TRAINED, False, "no tensor trains")
    return Check(_TRAINED, True, f"{len(states)} layers have the adapter on; those of one kind train alike")


def layers_apart(states: Mapping[str, str]) -> list[str]:
    """Return the names of layers that are in another state than most layers of their kind.

    Args:
        states: What is to be the same, by the layer's name.
    """
    kinds: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, state in states.items():
        kinds[_kind(name)][state].append(name)
    apart = []
    for found in kinds.values():
        usual = max(found, key=lambda state: (len(found[state]), "True" in state))
        apart += [name for state, names in found.items() if state != usual for name in names]
    return sorted(apart)
