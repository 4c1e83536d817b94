"""Folders that others load: a PEFT adapter or a whole model, with the tokenizer and its chat template beside it.

A folder is written under a temporary name, opened again, compared with the live weights, and only then given its name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

MANIFEST = "run_manifest.json"


def export_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, folder: Path, manifest: Mapping[str, Any]
) -> list[str]:
    """Write the adapter as plain PEFT reads it, and verify it.

    Args:
        model: The live model.
        tokenizer: Saved beside the weights, chat template included.
        folder: Replaced as a whole, or not at all.
        manifest: What this run was, for `run_manifest.json`.

    Returns:
        Names of tensors that are all zero, which means that they have not learned anything yet.

    Raises:
        RuntimeError: If what was written is not what is live.
    """
    zeros: list[str] = []

    def write(target: Path) -> None:
        # Embeddings are saved when they train (`modules_to_save`); PEFT's "auto" would ask the Hub about the base.
        model.save_pretrained(str(target), save_embedding_layers=False)
        zeros.extend(_verify(target / "adapter_model.safetensors", get_peft_model_state_dict(model)))

    _replace_folder(folder, tokenizer, manifest, write)
    return zeros


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, manifest: Mapping[str, Any]
) -> None:
    """Write the whole model as `AutoModelForCausalLM.from_pretrained` reads it; raises as `export_adapter` does."""

    def write(target: Path) -> None:
        model.save_pretrained(target)
        live = model.state_dict()
        for file in sorted(target.glob("*.safetensors")):
            names = load_file(file).keys()
            _verify(file, {name: live[name] for name in names})

    _replace_folder(folder, tokenizer, manifest, write)


def _verify(file: Path, live: Mapping[str, torch.Tensor]) -> list[str]:
    """Compare a safetensors file with live tensors; return the names of all-zero ones."""
    written = load_file(file)
    if written.keys() != live.keys():
        missing, extra = sorted(live.keys() - written.keys()), sorted(written.keys() - live.keys())
        raise RuntimeError(f"{file}: written keys differ from the trained ones: missing {missing}, extra {extra}")
    for name, tensor in live.items():
        if written[name].numel() == 0 or written[name].shape != tensor.shape:
            raise RuntimeError(f"{file}: {name} was written as {tuple(written[name].shape)}, not {tuple(tensor.shape)}")
        if not torch.equal(written[name], tensor.detach().cpu()):
            raise RuntimeError(f"{file}: {name} was written with other values than the live ones")
    return sorted(name for name, tensor in written.items() if not tensor.any())


def _replace_folder(
    folder: Path, tokenizer: PreTrainedTokenizerFast, manifest: Mapping[str, Any], write: Callable[[Path], None]
) -> None:
    """Write a folder whole or not at all: what `write` puts there, the tokenizer, and the manifest."""
    temporary, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    tokenizer.save_pretrained(temporary)
    (temporary / MANIFEST).write_text(json.dumps(dict(manifest), indent=2) + "\n")
    write(temporary)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
