"""Continue training an adapter from a folder: its configuration, its weights, and the YAML keys that it overrides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict

from sft_lightning.errors import UserError, few
from sft_lightning.models.adapters.config import PRESETS, AdapterConfig
from sft_lightning.models.adapters.folder import (
    EMBEDDING_WEIGHTS,
    AdapterError,
    load_weights,
    method_name,
    name_in_base,
    read_config,
    read_weights,
)
from sft_lightning.models.adapters.trainable import keep_base_weights, kept_base_names, trainable_base_names
from sft_lightning.models.base.vocabulary import grow_rows, tied_embedding_names
from sft_lightning.models.inspection import base_model

PEFT_KEYS = {
    "r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "target_modules",
    "modules_to_save": "modules_to_save",
    "bias": "bias",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "layers_to_transform": "layers_to_transform",
    "trainable_token_indices": "trainable_token_indices",
}
"""Our key → PEFT's."""


def read_adapter_config(path: str, *, drop_modules_to_save: bool) -> PeftConfig:
    """Read the configuration of an adapter that is to be trained further.

    Args:
        path: The adapter's folder, or a Hub id.
        drop_modules_to_save: Do not train the modules that were trained in full.

    Returns:
        PEFT's configuration, in training mode.

    Raises:
        UserError: If there is no adapter, or no `modules_to_save` to drop.
    """
    try:
        config = read_config(path)
    except AdapterError as error:
        raise UserError(f"model.adapter.path: {error}") from error
    config.inference_mode = False
    if drop_modules_to_save:
        if not getattr(config, "modules_to_save", None):
            raise UserError(f"model.adapter.drop_modules_to_save: the adapter in {path!r} has no modules_to_save")
        config.modules_to_save = None
        if hasattr(config, "ensure_weight_tying"):
            config.ensure_weight_tying = False
    return config  # type: ignore[no-any-return]


def continue_weights(model: PeftModel, config: AdapterConfig) -> None:
    """Load the weights of a continued adapter, and the base's weights that were trained and saved with it.

    Those that do not train here, such as dropped `modules_to_save`, keep their trained values and are exported again.

    Args:
        model: The base, wrapped with the adapter's configuration; `requires_grad` is set.
        config: A configuration with `path`.

    Raises:
        UserError: If names or shapes of the tensors do not fit the model, or one of two tied embeddings was trained.
    """
    path = str(config.path)
    parameters = {name_in_base(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    try:
        weights = read_weights(path)
        wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
        own = {key: name for key in weights.keys() - wanted.keys() if (name := name_in_base(key)) in parameters}
        if own:
            _check_tied(model, {name: weights[key] for key, name in own.items()}, path)
        for key, name in own.items():
            if len(weights[key]) < len(parameters[name]) and name.endswith(EMBEDDING_WEIGHTS):
                weights[key] = grow_rows(weights[key], len(parameters[name]))  # for tokens that are new to it
        load_weights(model, weights, source=path, base_parameters=set(own.values()))
    except AdapterError as error:
        raise UserError(f"model.adapter.path: {error}") from error
    trained = {name_in_base(name) for name in trainable_base_names(model)}
    keep_base_weights(model, set(own.values()) - trained)


def _check_tied(model: PeftModel, weights: Mapping[str, torch.Tensor], path: str) -> None:
    """Check that tied embeddings get one matrix."""
    tied = {name_in_base(name) + ".weight" for name in tied_embedding_names(base_model(model))}
    found = [weights[name] for name in sorted(tied & weights.keys())]
    config = read_config(path)
    untied = len(found) == 1 and config.modules_to_save and not getattr(config, "ensure_weight_tying", False)
    if untied or any(not torch.equal(found[0], other) for other in found[1:]):
        raise AdapterError(
            f"{path!r} trained one of two tied embeddings, which the base cannot hold; merge the adapter first, and "
            "start from the merged model"
        )


def describe_overrides(model: PeftModel, config: AdapterConfig) -> list[str]:
    """Return a line for each key of `model.adapter` that the continued adapter's configuration overrides.

    Args:
        model: The model with the adapter.
        config: The YAML's keys.
    """
    if config.path is None:
        return []
    own: Any = model.active_peft_config
    lines = []
    if kept := sorted(kept_base_names(model)):
        names = few([name_in_base(name) for name in kept])
        lines.append(
            f"model.adapter.path: {len(kept)} weights of the base that were trained with the adapter in {config.path} "
            f"({names}) keep their values; they do not train, and are exported again"
        )
    for key, peft_key in PEFT_KEYS.items():
        ours = _normalize(getattr(config, key))
        # The adapter stores the modules that a preset was resolved to, which cannot be compared with its name.
        if ours in (*PRESETS, "added"):
            continue
        if not hasattr(own, peft_key):
            if ours != _normalize(getattr(type(config), key, None)):
                kind = method_name(own)
                lines.append(
                    f"model.adapter.{key}: {ours!r} is ignored; the {kind} adapter in {config.path} has no {key}"
                )
        elif ours != (theirs := _normalize(getattr(own, peft_key))):
            lines.append(f"model.adapter.{key}: {theirs!r} from the adapter in {config.path} is used, not {ours!r}")
    return lines


def _normalize(value: Any) -> Any:
    """Return collections as sorted lists and empty ones as `None`, so that equal settings compare equal."""
    if isinstance(value, set | list | tuple):
        value = sorted(value)
    return None if value in ([], {}, None) else value
