"""Continue training an adapter: its own configuration, exactly its weights, and what differs from the YAML."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import PRESETS, AdapterConfig
from sft_lightning.models.adapters.folder import AdapterError, load_weights, name_in_base, read_config, read_weights
from sft_lightning.models.adapters.trainable import trainable_base_names

_COMPARED = {
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
"""Our key, and PEFT's."""


def read_adapter_config(path: str, *, drop_modules_to_save: bool) -> PeftConfig:
    """Return an adapter's configuration, ready for training.

    Raises:
        UserError: If there is none, or it has no modules to drop.
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
    """Load a continued adapter's weights, and those of the base that trained beside it.

    Args:
        model: The base, wrapped with the adapter's configuration; what is to train does.
        config: With `path`.

    Raises:
        UserError: If the file holds other tensors than the model wants, in name or shape, or weights of the base that
            would not be saved again, because they do not train.
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
                f"model.adapter.only_adapter: the adapter in {path!r} was trained together with {len(frozen)} weights "
                f"of its base ({frozen[0]} …), which would be frozen here and missing in the next export; set "
                "model.adapter.only_adapter: false, or merge the adapter first and start from the merged model"
            )
        load_weights(model, weights, source=path, base_parameters=trained)
    except AdapterError as error:
        raise UserError(f"model.adapter.path: {error}") from error


def describe_overrides(model: PeftModel, config: AdapterConfig) -> list[str]:
    """Return one line for every key of `model.adapter` that the continued adapter's own configuration overrides."""
    if config.path is None:
        return []
    own: Any = model.active_peft_config
    lines = []
    for key, peft_key in _COMPARED.items():
        ours = _plain(getattr(config, key))
        # What a preset stood for is written out in the adapter, and cannot be compared with its name.
        if ours in (*PRESETS, "added"):
            continue
        if not hasattr(own, peft_key):
            if ours != _plain(getattr(type(config), key, None)):
                kind = getattr(own.peft_type, "value", own.peft_type)
                lines.append(f"model.adapter.{key}: {ours!r} is not used; the {kind} adapter in {config.path} has none")
        elif ours != (theirs := _plain(getattr(own, peft_key))):
            lines.append(
                f"model.adapter.{key}: {theirs!r}, as in {config.path}; the {ours!r} of this configuration is not used"
            )
    return lines


def _plain(value: Any) -> Any:
    """Sets and lists sorted, empty collections as nothing, so that equal settings are equal."""
    if isinstance(value, set | list | tuple):
        value = sorted(value)
    return None if value in ([], {}, None) else value
