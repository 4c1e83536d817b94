"""The merge plan: adapters, base, configuration, and rows of the embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, PretrainedConfig

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.folder import embedding_rows, read_config
from sft_lightning.models.adapters.trained_base import base_fingerprint, read_manifest, trained_base
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.weight_files import weight_files

_MODEL_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.py", "*.jinja"]


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """The adapters to merge, their base, and how; decided before any weight is read."""

    name: str
    """The base, as the user or the adapter names it."""

    folder: Path
    """The base on this machine."""

    fingerprint: str | None = None
    """`base_fingerprint` of the base."""

    unverified: str | None = None
    """Why it is not known whether the first adapter was trained on this base; `None` if it was."""

    config: PretrainedConfig
    """The base's configuration, with the changes that training made to it."""

    adapters: list[Path]
    """Adapter folders, in the order in which they are merged."""

    vocab_sizes: list[int]
    """Rows of the embeddings before the first adapter, and after each."""

    quantization: QuantizationConfig | None
    """How the base was quantized while the adapter trained; `None` if it was not."""

    training_dtype: torch.dtype
    """Type of the weights that were not quantized, while the adapter trained."""

    dtype: torch.dtype | None
    """Type of the written weights; `None` keeps the type that the base stores for each."""

    max_shard_size: int
    """Largest file of weights, in bytes."""

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
    """Find the base and everything that decides the merge.

    Args:
        adapters: PEFT adapter folders, in order.
        model_name_or_path: The base; default: the one that the adapters name.
        quantization: How the base was quantized in training; default: as the last adapter's run manifest says.
        dtype: Type of the written weights; `None` keeps the stored types.
        max_shard_size: Largest file of weights, in bytes.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: If a folder is not an adapter, the adapters have different bases, or the base cannot be merged into.
    """
    folders = [Path(adapter) for adapter in adapters]
    name = model_name_or_path or _common_base(folders)
    folder = _local_folder(name)
    weight_files(folder)
    config = _read_base_config(name, folder, trust_remote_code)
    fingerprint = base_fingerprint(str(folder))
    # Later adapters may have been trained on the model that the earlier ones were merged into.
    unverified = trained_base(folders[0]).check(name, fingerprint)
    manifest = read_manifest(folders[-1])
    vocab_sizes = _vocab_sizes(config.get_text_config().vocab_size, folders)
    trained_base(folders[-1]).apply_to(config)
    if quantization is None and manifest.get("quantization"):
        quantization = QuantizationConfig(**manifest["quantization"])
    return MergePlan(
        name=name,
        folder=folder,
        fingerprint=fingerprint,
        unverified=unverified,
        config=config,
        adapters=folders,
        vocab_sizes=vocab_sizes,
        quantization=quantization,
        training_dtype=getattr(torch, manifest.get("dtype") or "bfloat16"),
        dtype=getattr(torch, dtype) if dtype else None,
        max_shard_size=max_shard_size,
        trust_remote_code=trust_remote_code,
    )


def _common_base(adapters: Sequence[Path]) -> str:
    bases = {str(read_config(adapter).base_model_name_or_path or "") for adapter in adapters}
    if len(bases) > 1:
        raise UserError(f"merge --adapter: the adapters have different bases: {', '.join(sorted(bases))}")
    base = bases.pop()
    if not base:
        raise UserError(f"merge --model_name_or_path: required, because {adapters[0]} names no base model")
    return base


def _local_folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=_MODEL_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"merge --model_name_or_path: cannot load a model from {name!r}: there is no such folder, and it cannot be "
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
            f"merge --model_name_or_path: {name!r} contains quantized weights, which cannot be merged into; name the "
            "model that was quantized"
        )
    return cast("PretrainedConfig", config)


def _vocab_sizes(rows: int, adapters: Sequence[Path]) -> list[int]:
    """Return the embeddings' rows before the first adapter, and those that each adapter was trained with.

    Raises:
        UserError: If an adapter was trained with fewer rows than the model has before it.
    """
    sizes = [rows]
    for adapter in adapters:
        wanted = read_manifest(adapter).get("vocab_size") or embedding_rows(adapter, default=sizes[-1])
        if wanted < sizes[-1]:
            raise UserError(
                f"merge --adapter: {str(adapter)!r} was trained with {wanted} tokens, but the model that it is merged "
                f"into has {sizes[-1]}; merge the adapters in the order of their vocabulary sizes, or check the base"
            )
        sizes.append(wanted)
    return sizes
