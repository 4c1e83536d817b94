"""An adapter folder as PEFT reads it, with every tensor accounted for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)

from sft_lightning.errors import UserError

CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "orthogonal", "mica", "lora_ga", "eva")
"""Initial weights of LoRA that are taken from the base's, which then no longer are what they were."""

_PREFIX = "base_model.model."


class AdapterError(UserError):
    """A folder is no adapter, or does not fit a model; the message names the folder, whoever catches it the key."""


def read_config(source: Path | str) -> Any:
    """Return PEFT's configuration of an adapter.

    Args:
        source: Its folder; as a `str` that is no folder here, a Hub id.

    Raises:
        AdapterError: If there is none, or PEFT does not know it.
    """
    folder = Path(source)
    if (folder.is_dir() or isinstance(source, Path)) and not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"{str(source)!r} is not an adapter folder: it has no adapter_config.json")
    try:
        config: Any = PeftConfig.from_pretrained(str(source))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"PEFT cannot read the configuration of {str(source)!r}: {error}") from error
    config.inference_mode = True
    return config


def read_weights(source: Path | str) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors, on the CPU.

    Raises:
        AdapterError: If there is no file with them.
    """
    folder = Path(source)
    files = ("adapter_model.safetensors", "adapter_model.bin")
    if (folder.is_dir() or isinstance(source, Path)) and not any((folder / name).is_file() for name in files):
        raise AdapterError(f"{str(source)!r} has no {files[0]} (nor .bin)")
    try:
        weights: dict[str, torch.Tensor] = load_peft_weights(str(source), device="cpu")
    except (OSError, ValueError) as error:
        raise AdapterError(f"PEFT cannot read the weights of {str(source)!r}: {error}") from error
    return weights


def name_in_base(key: str) -> str:
    """Return what the base, without an adapter, calls a parameter of a wrapped model or a tensor of an adapter."""
    return key.removeprefix(_PREFIX).replace(".base_layer.", ".")


def base_tensors(weights: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return those of an adapter's tensors that take the place of the base's own, under the base's names.

    Biases that trained, embeddings that PEFT saved, and weights that trained beside the adapter.

    Args:
        weights: From `read_weights`.
        model: The base, without an adapter.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name_in_base(key): tensor for key, tensor in weights.items() if name_in_base(key) in names}


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
        AdapterError: If keys are missing or left over, or shapes differ.
    """
    config = read_config(folder) if config is None else config
    weights = read_weights(folder)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    try:
        wrapped: Any = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise AdapterError(f"{str(folder)!r} does not fit this base: {error}") from error
    if prepare is not None:
        prepare(wrapped)
    load_weights(wrapped, weights, source=folder, base_parameters=parameters)
    return wrapped  # type: ignore[no-any-return]


def load_weights(
    wrapped: PeftModel, weights: dict[str, torch.Tensor], *, source: Path | str, base_parameters: Collection[str]
) -> None:
    """Load an adapter's tensors into a model that was wrapped with its configuration.

    Args:
        wrapped: The model.
        weights: From `read_weights`.
        source: Where they are from.
        base_parameters: Names of the base's own parameters that the weights may include.

    Raises:
        AdapterError: If the model wants other tensors, in name or shape.
    """
    wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    missing = sorted(wanted.keys() - weights.keys())
    extra = sorted(key for key in weights.keys() - wanted.keys() if name_in_base(key) not in base_parameters)
    if missing or extra:
        raise AdapterError(
            f"{str(source)!r} holds other tensors than its adapter_config.json asks for on this base: "
            f"missing {_few(missing)}, left over {_few(extra)}"
        )
    shapes = {
        name_in_base(name): parameter.shape for name, parameter in wrapped.named_parameters(remove_duplicate=False)
    }
    shapes |= {key: tensor.shape for key, tensor in wanted.items()}
    for key, tensor in weights.items():
        shape = shapes[key if key in wanted else name_in_base(key)]
        if tensor.shape != shape:
            raise AdapterError(
                f"{str(source)!r} does not fit this base: {key} is {tuple(tensor.shape)}, the model wants "
                f"{tuple(shape)}; is it of another base, or does model.add_tokens differ?"
            )
    set_peft_model_state_dict(wrapped, weights)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + ("…" if len(names) > 3 else "") if names else "none"
