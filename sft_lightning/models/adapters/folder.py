"""Read an adapter folder with PEFT, and load it into a model with every tensor accounted for."""

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
from safetensors import SafetensorError

from sft_lightning.errors import UserError

CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "orthogonal", "mica", "lora_ga", "eva")
"""Values of `init_lora_weights` that change the base's weights."""

EMBEDDING_WEIGHTS = tuple(
    f"{name}.weight"
    for name in ("embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings", "lm_head", "embed_out")
)
"""Endings of the names of embedding matrices and heads."""

_PREFIX = "base_model.model."


class AdapterError(UserError):
    """A folder is not an adapter, or does not fit a model; the caller adds the YAML key to the message."""


def read_config(source: Path | str) -> Any:
    """Return PEFT's configuration of an adapter.

    Args:
        source: The adapter's folder; a `str` that is not a folder here is a Hub id.

    Raises:
        AdapterError: If there is no configuration, or PEFT cannot read it.
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


def method_name(config: PeftConfig) -> str:
    """Return PEFT's name of a configuration's method, such as `LORA`."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def read_weights(source: Path | str) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter, on the CPU.

    Args:
        source: The adapter's folder; a `str` that is not a folder here is a Hub id.

    Raises:
        AdapterError: If there is no weight file, or PEFT cannot read it.
    """
    folder = Path(source)
    files = ("adapter_model.safetensors", "adapter_model.bin")
    if (folder.is_dir() or isinstance(source, Path)) and not any((folder / name).is_file() for name in files):
        raise AdapterError(f"{str(source)!r} has no {files[0]} (nor .bin)")
    try:
        weights: dict[str, torch.Tensor] = load_peft_weights(str(source), device="cpu")
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"PEFT cannot read the weights of {str(source)!r}: {error}") from error
    return weights


def embedding_rows(source: Path | str, default: int) -> int:
    """Return the rows of the embeddings that an adapter saved.

    Args:
        source: The adapter's folder; a `str` that is not a folder here is a Hub id.
        default: Returned if it saved none.

    Raises:
        AdapterError: If there is no weight file, or PEFT cannot read it.
    """
    found = [len(tensor) for key, tensor in read_weights(source).items() if key.endswith(EMBEDDING_WEIGHTS)]
    return max(found, default=default)


def name_in_base(key: str) -> str:
    """Return the base's own name of a parameter of a wrapped model, or of a tensor of an adapter."""
    return key.removeprefix(_PREFIX).replace(".base_layer.", ".")


def base_tensors(weights: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter that replace the base's own, under the base's names.

    These are trained biases, embeddings that PEFT saved, and weights that were trained beside the adapter.

    Args:
        weights: From `read_weights`, tensors of any shape.
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
    """Put an adapter on a model with PEFT, and check that its tensors are exactly those that the model expects.

    Args:
        model: The base, changed in place.
        folder: Adapter folder.
        config: Replaces the folder's configuration.
        prepare: Called with the wrapped model before the weights are loaded.

    Raises:
        AdapterError: If tensors are missing or left over, or shapes differ.
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
    """Load the tensors of an adapter into a model that is wrapped with its configuration.

    Args:
        wrapped: The model.
        weights: From `read_weights`, tensors of any shape.
        source: Where they are from, for messages.
        base_parameters: Names of the base's own parameters that the weights may include.

    Raises:
        AdapterError: If names or shapes of the tensors are not those that the model expects.
    """
    wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    missing = sorted(wanted.keys() - weights.keys())
    extra = sorted(key for key in weights.keys() - wanted.keys() if name_in_base(key) not in base_parameters)
    if missing or extra:
        raise AdapterError(
            f"{str(source)!r}: the tensors do not match adapter_config.json on this base: missing {_few(missing)}, "
            f"left over {_few(extra)}"
        )
    shapes = {
        name_in_base(name): parameter.shape for name, parameter in wrapped.named_parameters(remove_duplicate=False)
    }
    shapes |= {key: tensor.shape for key, tensor in wanted.items()}
    for key, tensor in weights.items():
        shape = shapes[key if key in wanted else name_in_base(key)]
        if tensor.shape != shape:
            raise AdapterError(
                f"{str(source)!r} does not fit this base: {key} has the shape {tuple(tensor.shape)}, expected "
                f"{tuple(shape)}; check that the base and model.add_tokens are those that it was trained with"
            )
    set_peft_model_state_dict(wrapped, weights)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + ("…" if len(names) > 3 else "") if names else "none"
