"""Continue training an adapter: its own configuration, exactly its weights, and what differs from the YAML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights

from sft_lightning.errors import UserError
from sft_lightning.models.targets import PRESETS

if TYPE_CHECKING:
    from sft_lightning.models.adapters import AdapterConfig

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
}
"""Our key, and PEFT's."""


def read_adapter_config(path: str, *, drop_modules_to_save: bool) -> PeftConfig:
    """Return the configuration in an adapter folder, ready for training.

    Raises:
        UserError: If there is none, or it has no modules to drop.
    """
    try:
        config: Any = PeftConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"model.adapter.path: cannot load an adapter from {path!r}: {error}") from error
    config.inference_mode = False
    if drop_modules_to_save:
        if not getattr(config, "modules_to_save", None):
            raise UserError(f"model.adapter.drop_modules_to_save: the adapter in {path!r} has no modules_to_save")
        config.modules_to_save = None
        if hasattr(config, "ensure_weight_tying"):
            config.ensure_weight_tying = False
    return config  # type: ignore[no-any-return]


def load_adapter_weights(model: PeftModel, path: str, *, drop_modules_to_save: bool) -> None:
    """Load an adapter's weights into a model that was wrapped with its configuration.

    Args:
        model: The wrapped model.
        path: Adapter folder.
        drop_modules_to_save: Leave out what belongs to modules trained in full.

    Raises:
        UserError: If the file holds other tensors than the model wants, in name or shape.
    """
    try:
        weights: dict[str, Any] = load_peft_weights(path, device="cpu")
    except (OSError, ValueError) as error:
        raise UserError(f"model.adapter.path: cannot load an adapter from {path!r}: {error}") from error
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if drop_modules_to_save:
        # What the configuration no longer asks for; a tensor of the adapter's method itself is never left out.
        prefix = model.base_model.prefix
        weights = {name: tensor for name, tensor in weights.items() if name in wanted}
        extra = [name for name in extra if str(prefix) in name]
    if missing or extra:
        raise UserError(
            f"model.adapter.path: the adapter in {path!r} does not fit this model: {len(missing)} tensors are missing "
            f"({', '.join(missing[:3])}), {len(extra)} are unknown ({', '.join(extra[:3])})"
        )
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"model.adapter.path: {name} in {path!r} is {tuple(tensor.shape)}, the model wants "
                f"{tuple(wanted[name].shape)}; is it of another base, or does model.add_tokens differ?"
            )
    set_peft_model_state_dict(model, weights)


def differences(model: PeftModel, config: AdapterConfig) -> list[str]:
    """Return one line for every key of `model.adapter` that the continued adapter's own configuration overrides."""
    own: Any = model.active_peft_config
    if config.path is None:
        return []
    lines = []
    for key, peft_key in _COMPARED.items():
        ours, theirs = _plain(getattr(config, key)), _plain(getattr(own, peft_key, None))
        # What a preset stood for is written out in the adapter, and cannot be compared with its name.
        if ours != theirs and ours not in PRESETS:
            lines.append(
                f"model.adapter.{key}: {theirs!r}, as in {config.path}; the {ours!r} of this configuration is not used"
            )
    return lines


def _plain(value: Any) -> Any:
    """Sets and lists sorted, empty collections as nothing, so that equal settings are equal."""
    if isinstance(value, set | list | tuple):
        value = sorted(value)
    return None if value in ([], {}, None) else value
