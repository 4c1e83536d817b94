"""Adapters into their base: a plain Hugging Face folder, proven by loading it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.export import export_model
from sft_lightning.models.loading import load_tokenizer


@dataclass(frozen=True)
class MergeReport:
    """What merging did, measured on the folder that was written."""

    output_dir: Path
    dtype: str
    max_logit_difference: float
    """Largest difference between the merged and the adapted model's logits on a probe."""

    logit_scale: float
    """Largest absolute logit of the adapted model on the probe."""

    moved: float
    """Largest difference between the merged and the base model's logits: what the adapters changed."""


def merge_adapters(
    adapters: Sequence[str], output_dir: str, *, base: str | None = None, dtype: str | None = None
) -> MergeReport:
    """Merge adapters into their base, in order, and verify the result.

    The update is added in float32 and rounded once, to `dtype`.

    Args:
        adapters: PEFT adapter folders.
        output_dir: Folder to write; replaced as a whole.
        base: Base model; default: the one that the first adapter names.
        dtype: Type of the written weights; default: the base's own.

    Raises:
        UserError: If a folder is not an adapter, or the adapters have different bases.
        RuntimeError: If the merged model, loaded again, does not answer like the adapted one.
    """
    base = base or _common_base(adapters)
    model = _load(base, torch.float32)
    target = getattr(torch, dtype) if dtype else _stored_dtype(base)
    probe = _probe(model)
    before = _logits(model, probe)
    for adapter in adapters:
        adapted = PeftModel.from_pretrained(model, adapter)
        expected = _logits(adapted, probe)
        model = adapted.merge_and_unload()
    tokenizer = load_tokenizer(adapters[-1])
    manifest = {"base": base, "adapters": list(adapters), "dtype": str(target).removeprefix("torch.")}
    model.to(dtype=target)  # type: ignore[call-arg]  # transformers wraps `to`, and loses its type
    export_model(model, tokenizer, Path(output_dir), manifest)
    merged = _logits(_load(output_dir, torch.float32), probe)  # what was written, not what a coarse type computes
    report = MergeReport(
        output_dir=Path(output_dir),
        dtype=str(target).removeprefix("torch."),
        max_logit_difference=float((merged - expected).abs().max()),
        logit_scale=float(expected.abs().max()),
        moved=float((merged - before).abs().max()),
    )
    # A dozen roundings of a weight in the written type, and what float32 itself loses on the way through the layers.
    tolerance = max(report.logit_scale, report.moved) * (16 * torch.finfo(target).eps + 1e-4)
    if report.max_logit_difference > tolerance:
        raise RuntimeError(
            f"{output_dir}: the merged model's logits differ from the adapted model's by "
            f"{report.max_logit_difference:.2e}, more than rounding to {report.dtype} explains ({tolerance:.2e})"
        )
    return report


def _common_base(adapters: Sequence[str]) -> str:
    bases = {_base_of(adapter) for adapter in adapters}
    if len(bases) > 1:
        raise UserError(f"merge --adapter: the adapters have different bases: {', '.join(sorted(bases))}")
    return bases.pop()


def _base_of(adapter: str) -> str:
    config = Path(adapter) / "adapter_config.json"
    if not config.is_file():
        raise UserError(f"merge --adapter: {adapter!r} is not an adapter folder: it has no adapter_config.json")
    base: str | None = json.loads(config.read_text()).get("base_model_name_or_path")
    if not base:
        raise UserError(f"merge --base: needed, because {config} names no base model")
    return base


def _load(path: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"merge --base: cannot load a model from {path!r}: {str(error).splitlines()[0]}") from error
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"transformers returned a {type(model).__name__}")
    model.eval()
    return model


def _stored_dtype(path: str) -> torch.dtype:
    dtype = AutoConfig.from_pretrained(path).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _probe(model: PreTrainedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.get_text_config().vocab_size, (2, 32), generator=generator)


@torch.no_grad()
def _logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits.float()
