"""The same merge by plain PEFT, on the whole model in float32: where weight by weight cannot be, and as proof."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from sft_lightning.compat.transformers import untie_head
from sft_lightning.merging.base import MergePlan, grow_embeddings
from sft_lightning.merging.quantized import QuantizedBase
from sft_lightning.models.adapters.folder import read_config
from sft_lightning.models.probing import logits_of


def load_float32(folder: Path, plan: MergePlan) -> PreTrainedModel:
    """Return a folder's model in float32; the base with what training changed of its configuration."""
    config = copy.deepcopy(plan.config) if folder == plan.folder else None
    options = {"dtype": torch.float32, "trust_remote_code": plan.trust_remote_code}
    model = checked(AutoModelForCausalLM.from_pretrained(folder, config=config, **options))
    model.eval()
    return model


def load_base(plan: MergePlan, quantized: QuantizedBase | None) -> PreTrainedModel:
    """Return the base in float32, with the values that quantization left, and rows for the first adapter's tokens."""
    model = load_float32(plan.folder, plan)
    for name in [] if quantized is None else quantized.names:
        model.get_parameter(name).data = quantized.weight(name)  # type: ignore[union-attr]
    grow_embeddings(model, plan.vocab_sizes[1])
    return model


def adapt(model: PreTrainedModel, plan: MergePlan) -> PeftModel:
    """Put the adapters on a base through plain PEFT: all but the last are merged; the base is changed by it."""
    *earlier, last = zip(plan.adapters, plan.vocab_sizes[1:], strict=True)
    for adapter, rows in earlier:
        model = _merged(_put(model, adapter, rows))
    return _put(model, *last)


def _put(model: PreTrainedModel, adapter: Path, rows: int) -> PeftModel:
    grow_embeddings(model, rows)
    _untie_if_adapted(model, adapter)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


@dataclass(frozen=True)
class ReferenceLogits:
    """(B, S, vocabulary) logits of a probe, by plain PEFT in float32."""

    base: torch.Tensor
    """Of the base."""

    adapted: torch.Tensor
    """Of the base under its adapters."""

    merged: torch.Tensor
    """Of the two merged by PEFT."""

    rounded: torch.Tensor
    """Of that, each weight rounded to the type that it is written in."""


def reference_logits(
    plan: MergePlan, quantized: QuantizedBase | None, probe: torch.Tensor, dtypes: Mapping[str, torch.dtype]
) -> ReferenceLogits:
    """Return what the written model is compared with.

    Args:
        plan: What is merged into what.
        quantized: For the values that quantization left, instead of the stored ones.
        probe: (B, S) token ids.
        dtypes: The written type of each weight.
    """
    model = load_base(plan, quantized)
    base = logits_of(model, probe)
    adapted_model = adapt(model, plan)
    adapted = logits_of(adapted_model, probe)
    merged_model = _merged(adapted_model)
    merged = logits_of(merged_model, probe)
    for name, parameter in merged_model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, torch.float32)).float()
    return ReferenceLogits(base, adapted, merged, logits_of(merged_model, probe))


def merge_whole(plan: MergePlan, quantized: QuantizedBase | None) -> PreTrainedModel:
    """Return the merged model in float32."""
    return _merged(adapt(load_base(plan, quantized), plan))


def _merged(model: PeftModel) -> PreTrainedModel:
    tuner: Any = model
    return checked(tuner.merge_and_unload())


def checked(model: object) -> PreTrainedModel:
    """Return a model that a library returned, known to be one of transformers'."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers model, not a {type(model).__name__}")
    return model


def _untie_if_adapted(model: PreTrainedModel, adapter: Path) -> None:
    """Give the head a matrix of its own where merging would otherwise change both that are one."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    config = read_config(adapter)
    if head is None or head.weight is not embedding.weight or getattr(config, "ensure_weight_tying", False):
        return
    ends = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module in (head, embedding)}
    targets = getattr(config, "target_modules", None) or []
    listed = [*(getattr(config, "modules_to_save", None) or []), *([] if isinstance(targets, str) else targets)]
    matched = isinstance(targets, str) and any(end in targets for end in ends)
    if not matched and not ends & {name.rsplit(".", 1)[-1] for name in listed}:
        return
    untie_head(model)
