"""Continue training an adapter from a folder: its configuration, its weights, and the YAML keys that it overrides."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import PRESETS, AdapterConfig
from sft_lightning.models.adapters.folder import (
    AdapterError,
    load_weights,
    method_name,
    name_in_base,
    read_config,
    read_weights,
)
from sft_lightning.models.adapters.trainable import trainable_base_names

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
        drop_modules_to_save: Leave out the modules that were trained in full.

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

    Args:
        model: The base, wrapped with the adapter's configuration; `requires_grad` is set.
        config: A configuration with `path`.

    Raises:
        UserError: If names or shapes of the tensors do not fit the model, or if the file has weights of the base that
            would not train here, and so would be missing in the next export.
    """
    path = str(config.path)
    try:
        weights = read_weights(path)
        wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
        if config.drop_modules_to_save:
            dropped = [f".{name}." for name in read_config(path).modules_to_save]
            gone = {key for key in weights.keys() - wanted.keys() if any(name in f".{key}" for name in dropped)}
            weights = {key: tensor for key, tensor in weights.items() if key not in gone}
        names = {name_in_base(name) for name, _ in model.named_parameters()}
        trained = {name_in_base(name) for name in trainable_base_names(model)}
        frozen = sorted(n for k in weights.keys() - wanted.keys() if (n := name_in_base(k)) in names - trained)
        if frozen:
            raise UserError(
                f"model.adapter.only_adapter: must be false, because the adapter in {path!r} was trained together with "
                f"{len(frozen)} weights of its base ({frozen[0]} …), which would be missing in the next export; or "
                "merge the adapter first, and start from the merged model"
            )
        load_weights(model, weights, source=path, base_parameters=trained)
    except AdapterError as error:
        raise UserError(f"model.adapter.path: {error}") from error


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
