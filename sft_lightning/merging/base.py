"""The base that adapters are merged into: where it is, and what training changed of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.folder import read_config, read_weights
from sft_lightning.models.base.quantization import QuantizationConfig
from sft_lightning.models.base.weight_files import weight_files
from sft_lightning.models.export.write import MANIFEST

_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings", "lm_head", "embed_out")
_OF_A_MODEL = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.py", "*.jinja"]


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """What is merged into what, decided before a weight is read."""

    name: str
    """The base, as it was named."""

    folder: Path
    """The base on this machine."""

    config: PretrainedConfig
    """The base's configuration, with what training changed of it."""

    adapters: list[Path]
    """Adapter folders, in the order in which they are merged."""

    vocab_sizes: list[int]
    """Rows of the embeddings before the first adapter, and after each."""

    quantization: QuantizationConfig | None
    """How the base was stored while the adapter trained."""

    training_dtype: torch.dtype
    """Type of the weights that were not quantized, while the adapter trained."""

    dtype: torch.dtype | None
    """Type of the written weights; `None`: as the base stores each."""

    max_shard_size: int
    """Bytes per written file at most."""

    trust_remote_code: bool = False
    """Run code that comes with the model."""


def plan_merge(
    adapters: Sequence[str],
    *,
    model_name_or_path: str | None,
    quantization: QuantizationConfig | None,
    dtype: str | None,
    max_shard_size: int,
    trust_remote_code: bool = False,
) -> MergePlan:
    """Decide what is merged into what.

    Raises:
        UserError: If a folder is not an adapter, the adapters have different bases, or the base cannot be merged into.
    """
    folders = [Path(adapter) for adapter in adapters]
    name = model_name_or_path or _common_base(folders)
    folder = _local_folder(name)
    weight_files(folder)
    config = _read_base_config(name, folder, trust_remote_code)
    manifest = read_manifest(folders[-1])
    vocab_sizes = _vocab_sizes(config.get_text_config().vocab_size, folders)
    _as_trained(config, manifest)
    if quantization is None and manifest.get("quantization"):
        quantization = QuantizationConfig(**manifest["quantization"])
    return MergePlan(
        name=name,
        folder=folder,
        config=config,
        adapters=folders,
        vocab_sizes=vocab_sizes,
        quantization=quantization,
        training_dtype=getattr(torch, manifest.get("dtype") or "bfloat16"),
        dtype=getattr(torch, dtype) if dtype else None,
        max_shard_size=max_shard_size,
        trust_remote_code=trust_remote_code,
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what the run that made an adapter says of itself; empty for an adapter from elsewhere."""
    file = folder / MANIFEST
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return manifest


def _common_base(adapters: Sequence[Path]) -> str:
    bases = {str(read_config(adapter).base_model_name_or_path or "") for adapter in adapters}
    if len(bases) > 1:
        raise UserError(f"merge --adapter: the adapters have different bases: {', '.join(sorted(bases))}")
    base = bases.pop()
    if not base:
        raise UserError(f"merge --model_name_or_path: needed, because {adapters[0]} names no base model")
    return base


def _local_folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=_OF_A_MODEL))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"merge --model_name_or_path: cannot load a model from {name!r}, neither a folder here nor to be "
            f"downloaded: {reason}"
        ) from error


def _read_base_config(name: str, folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"merge --model_name_or_path: cannot load a model from {name!r}: {str(error).splitlines()[0]}"
        ) from error
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"merge --model_name_or_path: {name!r} holds quantized weights, which an update cannot be added to; "
            "name the model that they were made from"
        )
    return cast("PretrainedConfig", config)


def _as_trained(config: PretrainedConfig, manifest: dict[str, Any]) -> None:
    """Write what the run changed of the configuration, such as a longer context, into it."""
    text = config.get_text_config()
    for key in ("rope_parameters", "max_position_embeddings"):
        if manifest.get(key) is not None and hasattr(text, key):
            setattr(text, key, manifest[key])


def _vocab_sizes(rows: int, adapters: Sequence[Path]) -> list[int]:
    """Return the embeddings' rows before the first adapter, and those that each adapter was trained with.

    Raises:
        UserError: If an adapter has fewer than there are before it.
    """
    sizes = [rows]
    for adapter in adapters:
        wanted = read_manifest(adapter).get("vocab_size") or _rows_in(adapter, sizes[-1])
        if wanted < sizes[-1]:
            raise UserError(
                f"merge --adapter: {str(adapter)!r} was trained with {wanted} tokens, and what it is merged into has "
                f"{sizes[-1]}; merge the adapters in the order of their vocabularies, or check the base"
            )
        sizes.append(wanted)
    return sizes


def _rows_in(adapter: Path, rows: int) -> int:
    """Return the embedding rows that an adapter's own tensors speak of; `rows` if they speak of none."""
    found = [
        len(tensor)
        for key, tensor in read_weights(adapter).items()
        if key.endswith(tuple(f"{name}.weight" for name in _EMBEDDINGS))
    ]
    return max(found, default=rows)


def grown(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Return an embedding with new rows at the mean of those that it has, as training made them."""
    missing = rows - len(tensor)
    if missing <= 0:
        return tensor
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(missing, *tensor.shape[1:])])


def grow_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Give a model's embeddings as many rows, the new ones at the mean of the old ones."""
    old = len(next(model.get_input_embeddings().parameters()))
    if old == rows:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in module.parameters() if module is not None else ():
            parameter.data = grown(parameter.data[:old], rows)
