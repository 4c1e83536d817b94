"""An adapter folder as PEFT reads it, with every key accounted for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights

from sft_lightning.errors import UserError

_PREFIX = "base_model.model."


def read_config(folder: Path) -> Any:
    """Return PEFT's configuration in an adapter folder.

    Raises:
        UserError: If there is none, or PEFT does not know it.
    """
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"merge --adapter: {str(folder)!r} is not an adapter folder: it has no adapter_config.json")
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"merge --adapter: PEFT cannot read {str(folder / 'adapter_config.json')!r}: {error}"
        ) from error
    config.inference_mode = True
    return config


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return an adapter folder's tensors, on the CPU.

    Raises:
        UserError: If there is no file with them.
    """
    if not any((folder / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise UserError(f"merge --adapter: {str(folder)!r} has no adapter_model.safetensors (nor .bin)")
    weights: dict[str, torch.Tensor] = load_peft_weights(str(folder), device="cpu")
    return weights


def base_tensors(weights: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return those of an adapter's tensors that take the place of the base's own, under the base's names.

    Biases that trained, embeddings that PEFT saved, and weights that trained beside the adapter.

    Args:
        weights: From `read_weights`.
        model: The base, without an adapter.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    plain = {key.removeprefix(_PREFIX).replace(".base_layer.", "."): tensor for key, tensor in weights.items()}
    return {name: tensor for name, tensor in plain.items() if name in names}


def attach_adapter(
    model: torch.nn.Module,
    folder: Path,
    *,
    config: Any = None,
    prepare: Callable[[PeftModel], None] | None = None,
) -> PeftModel:
    """Put an adapter on a model through PEFT; neither a tensor of the file nor one of the model may be left over.

    Args:
        model: The base, changed in place.
        folder: Adapter folder.
        config: Instead of the folder's configuration.
        prepare: Called with the wrapped model before the weights are loaded.

    Raises:
        UserError: If keys are missing or left over, or shapes differ.
    """
    config = read_config(folder) if config is None else config
    weights = read_weights(folder)
    base_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    try:
        wrapped: Any = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"merge --adapter: {str(folder)!r} does not fit this base: {error}") from error
    if prepare is not None:
        prepare(wrapped)
    _check_keys(folder, wrapped, weights, base_names)
    set_peft_model_state_dict(wrapped, weights)
    return wrapped  # type: ignore[no-any-return]


def _check_keys(folder: Path, wrapped: PeftModel, weights: dict[str, torch.Tensor], base_names: set[str]) -> None:
    wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    missing = sorted(wanted.keys() - weights.keys())
    plain = {key: key.removeprefix(_PREFIX).replace(".base_layer.", ".") for key in weights.keys() - wanted.keys()}
    extra = sorted(key for key, name in plain.items() if name not in base_names)
    if missing or extra:
        raise UserError(
            f"merge --adapter: {str(folder)!r} holds other tensors than its adapter_config.json asks for: "
            f"missing {_few(missing)}, left over {_few(extra)}"
        )
    for key, tensor in wanted.items():
        if tensor.shape != weights[key].shape:
            raise UserError(
                f"merge --adapter: {str(folder)!r} does not fit this base: {key} is {tuple(weights[key].shape)}, "
                f"the model wants {tuple(tensor.shape)}"
            )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + ("…" if len(names) > 3 else "") if names else "none"
