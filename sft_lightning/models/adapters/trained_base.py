"""The base that an adapter was trained on, as its `run_manifest.json` says: which one, and with which changes.

The file may be a stranger's: only plain numbers, names and hashes are taken from it, nothing that runs code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import xxhash
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import PretrainedConfig

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.folder import AdapterError
from sft_lightning.models.base.weight_files import weights_fingerprint

MANIFEST = "run_manifest.json"
"""The file in which an exported folder says how its weights were made."""

_MAX_ROWS = 1 << 24
_UNREADABLE = (UserError, SafetensorError, UnpicklingError, OSError, ValueError, KeyError, RuntimeError, EOFError)


def base_fingerprint(name_or_path: str | None, from_config: Mapping[str, Any] | None = None) -> str | None:
    """Return a hash that tells a base from others, in whatever type or quantization it is loaded.

    Args:
        name_or_path: Folder or Hub id; `None` with `from_config`.
        from_config: The configuration of random weights, which the process's seed decides too.

    Returns:
        The hash; `None` if the base is not in files that can be read.
    """
    if from_config is not None:
        text = json.dumps({"from_config": dict(from_config), "seed": torch.initial_seed()}, sort_keys=True, default=str)
        return xxhash.xxh3_64_hexdigest(text.encode())
    folder = _files_of(str(name_or_path))
    try:
        return None if folder is None else weights_fingerprint(folder)
    except _UNREADABLE:
        return None  # loading the model says what is wrong, or reads them in another way


def _files_of(name_or_path: str) -> Path | None:
    """Return the folder of a model on this machine; `None` if it has not been downloaded."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    try:
        config = try_to_load_from_cache(name_or_path, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def read_manifest(source: Path | str) -> dict[str, Any]:
    """Return the `run_manifest.json` of an exported folder; empty if there is none.

    Args:
        source: The folder; a `str` that is not a folder here is a Hub id.

    Raises:
        AdapterError: If the file is damaged.
    """
    file = Path(source).expanduser() / MANIFEST
    if not file.parent.is_dir() and isinstance(source, str):
        try:
            file = Path(hf_hub_download(source, MANIFEST))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            return {}
    if not file.is_file():
        return {}
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{str(file)!r} is damaged: {error}; restore it, or remove it") from error
    if not isinstance(manifest, dict):
        raise AdapterError(f"{str(file)!r} is damaged: expected an object, found a {type(manifest).__name__}")
    return manifest


@dataclass(frozen=True, kw_only=True)
class TrainedBase:
    """What an adapter's manifest says of the base; everything is `None` for an adapter without a manifest."""

    source: str
    """The adapter's folder or Hub id."""

    name: str | None = None
    """The base, as the run named it."""

    fingerprint: str | None = None
    """`base_fingerprint` of the base."""

    vocab_size: int | None = None
    """Rows of the embeddings during training."""

    rope_parameters: dict[str, Any] | None = None
    """RoPE of the model during training, as transformers writes it."""

    max_position_embeddings: int | None = None
    """Longest context of the model during training, in tokens."""

    @property
    def context(self) -> dict[str, Any]:
        """RoPE and longest context during training, by their names in a configuration; empty if unknown."""
        own = {key: getattr(self, key) for key in ("rope_parameters", "max_position_embeddings")}
        return {key: value for key, value in own.items() if value is not None}

    def check(self, name: str, fingerprint: str | None) -> str | None:
        """Check that a base is the one that the adapter was trained on.

        Args:
            name: The base, as the user names it.
            fingerprint: Its `base_fingerprint`.

        Returns:
            A line for the log if this cannot be known; `None` if it is the same base.

        Raises:
            AdapterError: If it is another one.
        """
        if self.fingerprint is None:
            return f"the base of the adapter in {self.source} cannot be verified: it has no fingerprint in a {MANIFEST}"
        if fingerprint is None:
            return f"the base of the adapter in {self.source} cannot be verified: {name} has no weight files to read"
        if fingerprint == self.fingerprint:
            return None
        raise AdapterError(
            f"{self.source!r} was trained on {self.name or 'another base'!r} (fingerprint {self.fingerprint}), but "
            f"{name!r} has other weights (fingerprint {fingerprint}); use the base that it was trained on, or train a "
            "new adapter"
        )

    def changes(self, config: PretrainedConfig) -> dict[str, Any]:
        """Return what training changed in a base's configuration, such as a longer context.

        Args:
            config: The base's configuration.
        """
        text = config.get_text_config()
        return {key: value for key, value in self.context.items() if getattr(text, key, value) != value}

    def apply_to(self, config: PretrainedConfig) -> list[str]:
        """Write the changes into a base's configuration, and return a line for the log for each.

        Args:
            config: Changed in place.
        """
        text, changes = config.get_text_config(), self.changes(config)
        lines = [
            f"{key}: {value} as the adapter in {self.source} was trained with, not {getattr(text, key)}"
            for key, value in changes.items()
        ]
        for key, value in changes.items():
            setattr(text, key, value)
        return lines


def trained_base(source: Path | str) -> TrainedBase:
    """Read what an adapter's manifest says of its base.

    Args:
        source: The adapter's folder; a `str` that is not a folder here is a Hub id.

    Raises:
        AdapterError: If the manifest is damaged.
    """
    manifest = read_manifest(source)
    return TrainedBase(
        source=str(source),
        name=_value(manifest, "base", str, source),
        fingerprint=_value(manifest, "base_fingerprint", str, source),
        vocab_size=_value(manifest, "vocab_size", int, source),
        rope_parameters=_value(manifest, "rope_parameters", dict, source),
        max_position_embeddings=_value(manifest, "max_position_embeddings", int, source),
    )


def _value(manifest: Mapping[str, Any], key: str, kind: type, source: Path | str) -> Any:
    """Return a value of the manifest, of the kind that it must have."""
    value = manifest.get(key)
    too_large = isinstance(value, int) and key == "vocab_size" and not 0 < value <= _MAX_ROWS
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool) or too_large):
        raise AdapterError(f"{MANIFEST} of {str(source)!r} is damaged: {key} is {value!r}; restore it, or remove it")
    return value
