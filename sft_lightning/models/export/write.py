"""Export a PEFT adapter or a whole model to a folder, with the tokenizer and its chat template.

A folder is written under a temporary name, loaded again, compared with the live weights, and only then renamed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.folder import AdapterError
from sft_lightning.models.adapters.trainable import kept_base_names
from sft_lightning.models.base.weight_files import read_tensors, tensor_names, weight_files
from sft_lightning.models.export.check import export_difference
from sft_lightning.models.export.stopping import generation_config_of, write_stop_tokens
from sft_lightning.models.export.target import MANIFEST, replaced_folder
from sft_lightning.models.inspection import base_model, is_sharded, max_positions, nonfinite_names
from sft_lightning.models.probing import random_ids

_ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterReport:
    """The verification of an exported adapter."""

    zeros: list[str]
    """Names of tensors that are all zero, because they have not learned anything yet."""

    base_weights: list[str]
    """Names of trained tensors in the file that belong to the base, not to the adapter."""

    logit_difference: float | None
    """Largest absolute difference between the logits of the live model and of its base under the exported adapter;
    `None` if the model is sharded."""


def export_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    manifest: Mapping[str, Any],
    *,
    stop_token_id: int,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> AdapterReport:
    """Write an adapter that plain PEFT loads, and verify it.

    Weights that were trained beside the adapter (`model.adapter.only_adapter: false`) go into the same file under the
    base's names, and PEFT loads them into the base.

    Args:
        model: The live model.
        tokenizer: Saved beside the weights, chat template included.
        folder: The folder to write; replaced as a whole, or not at all.
        manifest: The run's description, for `run_manifest.json`.
        stop_token_id: The token that ends an answer, for `generation_config.json`.
        precision: Makes the context of the forward passes, such as autocast.

    Raises:
        UserError: If the trained weights are not finite.
        RuntimeError: If the written tensors, or the logits that they give, differ from the live ones.
    """
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    beside = _trained_beside(model, live)
    _check_finite({**live, **beside}, folder)
    with replaced_folder(folder) as target:
        _write_companions(target, tokenizer, manifest)
        write_stop_tokens(target, generation_config_of(base_model(model)), [stop_token_id])
        # Embeddings are saved when they train (`modules_to_save`); PEFT's "auto" would ask the Hub about the base.
        model.save_pretrained(str(target), save_embedding_layers=False)
        if beside:
            _add_tensors(target / _ADAPTER, beside)
        zeros = _verify_tensors(target / _ADAPTER, {**live, **beside})
        difference = _verify_logits(model, target, precision) if not is_sharded(model) else None
    return AdapterReport(zeros, sorted(beside), difference)


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    manifest: Mapping[str, Any],
    *,
    stop_token_id: int,
) -> None:
    """Write a whole model that `AutoModelForCausalLM.from_pretrained` loads, and verify it.

    Args:
        model: The live model.
        tokenizer: Saved beside the weights, chat template included.
        folder: The folder to write; replaced as a whole, or not at all.
        manifest: The run's description, for `run_manifest.json`.
        stop_token_id: The token that ends an answer, for `generation_config.json`.

    Raises:
        UserError: If the trained weights are not finite.
        RuntimeError: If the written tensors differ from the live ones.
    """
    _check_finite(model.state_dict(), folder)
    with replaced_folder(folder) as target:
        _write_companions(target, tokenizer, manifest)
        model.save_pretrained(target)
        write_stop_tokens(target, generation_config_of(model), [stop_token_id])  # over the base's own
        _verify_model(target, model)


def _check_finite(live: Mapping[str, torch.Tensor], folder: Path) -> None:
    if names := nonfinite_names(live):
        raise UserError(
            f"{folder} is not written, because {len(names)} of {len(live)} trained tensors are NaN or infinite, such "
            f"as {names[0]}: the training has diverged; continue from an earlier checkpoint with a lower learning rate "
            "(model.optimizer.init_args.lr)"
        )


def _write_companions(folder: Path, tokenizer: PreTrainedTokenizerFast, manifest: Mapping[str, Any]) -> None:
    tokenizer.save_pretrained(folder)
    (folder / MANIFEST).write_text(json.dumps(dict(manifest), indent=2) + "\n", encoding="utf-8")


def _trained_beside(model: PeftModel, adapter: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the base's weights that were trained, now or before, under the names by which PEFT loads them."""
    known, kept = {tensor.data_ptr() for tensor in adapter.values()}, kept_base_names(model)
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if (parameter.requires_grad or name in kept) and parameter.data_ptr() not in known
    }


def _add_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    more = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})


def _verify_tensors(file: Path, live: Mapping[str, torch.Tensor]) -> list[str]:
    """Compare a safetensors file with live tensors; return the names of all-zero ones."""
    written = load_file(file)
    if written.keys() != live.keys():
        missing, extra = sorted(live.keys() - written.keys()), sorted(written.keys() - live.keys())
        raise RuntimeError(f"{file}: the written tensors are not the trained ones: missing {missing}, extra {extra}")
    for name, tensor in live.items():
        _compare(file, name, written[name], tensor)
    return sorted(name for name, tensor in written.items() if not tensor.any())


def _compare(file: Path, name: str, written: torch.Tensor, live: torch.Tensor) -> None:
    if written.numel() == 0 or written.shape != live.shape:
        raise RuntimeError(
            f"{file}: {name} was written with the shape {tuple(written.shape)}, expected {tuple(live.shape)}"
        )
    if not torch.equal(written, live.detach().cpu()):
        raise RuntimeError(f"{file}: the written values of {name} differ from the live ones")


def _verify_logits(model: PeftModel, folder: Path, precision: Callable[[], AbstractContextManager[Any]]) -> float:
    """Return the largest difference between logits of a probe; raise if it is more than rounding."""
    config = base_model(model).config
    probe = random_ids(config.get_text_config().vocab_size, rows=1, length=min(16, max_positions(config)))
    try:
        difference, scale = export_difference(model, folder, probe.to(model.device), precision=precision)
    except AdapterError as error:
        raise RuntimeError(f"the export cannot be loaded again: {error}") from error
    if not difference <= 1e-4 * max(scale, 1.0):  # not-a-number included
        raise RuntimeError(
            f"{folder}: the exported adapter has other logits than the trained model: they differ by up to "
            f"{difference:.2e}, the largest is {scale:.2e}"
        )
    return difference


def _verify_model(folder: Path, model: PreTrainedModel) -> None:
    """Check that the files have every live tensor with its values, tied tensors once."""
    live = model.state_dict()
    written: Iterator[tuple[str, torch.Tensor]]
    if tensor_names(folder) <= live.keys():
        written = (item for file in weight_files(folder) for item in read_tensors(file))
    else:  # some families store their tensors under other names
        written = iter(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict().items())
    stored = set()
    for name, tensor in written:
        _compare(folder, name, tensor, live[name])
        stored.add(live[name].data_ptr())
    missing = sorted(name for name, tensor in live.items() if tensor.data_ptr() not in stored)
    if missing:
        raise RuntimeError(f"{folder}: these tensors are missing in the written files: {missing}")
