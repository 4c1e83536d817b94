"""The same merge by plain PEFT, on the whole model in float32.

It is the merge itself for adapters that cannot be merged weight by weight, and the reference that every merged model is
compared with.
"""

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
from sft_lightning.merging.plan import MergePlan
from sft_lightning.merging.quantized import QuantizedBase
from sft_lightning.merging.report import LogitDifference
from sft_lightning.models.adapters.folder import read_config
from sft_lightning.models.base.vocabulary import grow_embeddings, tied_embedding_names
from sft_lightning.models.inspection import base_model
from sft_lightning.models.probing import logits_of

_RELATIVE_TOLERANCE = 1e-4


def load_float32(folder: Path, plan: MergePlan) -> PreTrainedModel:
    """Load a model in float32 and evaluation mode.

    Args:
        folder: The base, which gets the plan's configuration, or a merged model, which has its own.
        plan: The merge plan.
    """
    config = copy.deepcopy(plan.config) if folder == plan.folder else None
    options = {"dtype": torch.float32, "trust_remote_code": plan.trust_remote_code}
    return base_model(AutoModelForCausalLM.from_pretrained(folder, config=config, **options).eval())


def merge_in_memory(plan: MergePlan, quantized: QuantizedBase | None) -> PreTrainedModel:
    """Merge all adapters with PEFT, the whole model in memory.

    Args:
        plan: The merge plan.
        quantized: Merge into the values that quantization left; default: into the stored ones.

    Returns:
        The merged model in float32.
    """
    return _unload(_put_adapters(_load_base(plan, quantized), plan))


def _load_base(plan: MergePlan, quantized: QuantizedBase | None) -> PreTrainedModel:
    """Return the base in float32, with rows for the first adapter's tokens."""
    model = load_float32(plan.folder, plan)
    for name in [] if quantized is None else quantized.names:
        model.get_parameter(name).data = quantized.dequantize(name)  # type: ignore[union-attr]
    grow_embeddings(model, plan.vocab_sizes[1])
    return model


def _put_adapters(model: PreTrainedModel, plan: MergePlan) -> PeftModel:
    """Merge all adapters but the last into the base, and put the last one on it."""
    *earlier, last = zip(plan.adapters, plan.vocab_sizes[1:], strict=True)
    for adapter, rows in earlier:
        model = _unload(_put_adapter(model, adapter, rows))
    return _put_adapter(model, *last)


def _put_adapter(model: PreTrainedModel, adapter: Path, rows: int) -> PeftModel:
    grow_embeddings(model, rows)
    _untie_if_adapted(model, adapter)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def _unload(model: PeftModel) -> PreTrainedModel:
    tuner: Any = model
    return base_model(tuner.merge_and_unload())


def _untie_if_adapted(model: PreTrainedModel, adapter: Path) -> None:
    """Give the head a matrix of its own if the adapter changes only one of two tied embeddings."""
    config = read_config(adapter)
    ends = {name.rsplit(".", 1)[-1] for name in tied_embedding_names(model)}
    if not ends or getattr(config, "ensure_weight_tying", False):
        return
    targets = getattr(config, "target_modules", None) or []
    listed = [*(getattr(config, "modules_to_save", None) or []), *([] if isinstance(targets, str) else targets)]
    matched = isinstance(targets, str) and any(end in targets for end in ends)
    if not matched and not ends & {name.rsplit(".", 1)[-1] for name in listed}:
        return
    untie_head(model)


@dataclass(frozen=True)
class ReferenceLogits:
    """(B, S, vocabulary) logits of a probe, by plain PEFT in float32."""

    base: torch.Tensor
    """Logits of the base."""

    adapted: torch.Tensor
    """Logits of the base under its adapters."""

    merged: torch.Tensor
    """Logits of the model that PEFT merged."""

    rounded: torch.Tensor
    """Logits of the model that PEFT merged, each weight rounded to the type that it is written in."""


def reference_logits(
    plan: MergePlan, quantized: QuantizedBase | None, probe: torch.Tensor, dtypes: Mapping[str, torch.dtype]
) -> ReferenceLogits:
    """Compute the logits that the written model is compared with.

    Args:
        plan: The merge plan.
        quantized: Merge into the values that quantization left; default: into the stored ones.
        probe: Token ids, (B, S).
        dtypes: The written type of each weight.
    """
    model = _load_base(plan, quantized)
    base = logits_of(model, probe)
    adapted_model = _put_adapters(model, plan)
    adapted = logits_of(adapted_model, probe)
    merged_model = _unload(adapted_model)
    merged = logits_of(merged_model, probe)
    for name, parameter in merged_model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, torch.float32)).float()
    return ReferenceLogits(base, adapted, merged, logits_of(merged_model, probe))


def compare_with_reference(reference: ReferenceLogits, merged: torch.Tensor) -> LogitDifference:
    """Compare the written model with plain PEFT.

    Args:
        reference: From `reference_logits`.
        merged: Logits of the written model, loaded again, (B, S, vocabulary).

    Raises:
        RuntimeError: If they differ by more than rounding explains, or PEFT's own merge does not answer like the
            adapter.
    """
    found = LogitDifference(
        largest=_largest(merged - reference.adapted),
        scale=_largest(reference.adapted),
        moved=_largest(merged[..., : reference.base.shape[-1]] - reference.base),
    )
    exact = _RELATIVE_TOLERANCE * max(found.scale, found.moved)
    if not _largest(reference.merged - reference.adapted) <= 10 * exact:  # not-a-number included
        raise RuntimeError(
            "merging changes the model's answers: logits with the adapter merged by PEFT differ from those with the "
            f"adapter kept separate by up to {_largest(reference.merged - reference.adapted):.2e}; nothing was written"
        )
    # Layers sum float32 values in another order, which tips the rounding of some weights the other way.
    rounding = _largest(reference.rounded - reference.adapted)
    tolerance = exact + rounding / 2
    beyond = _largest(merged - reference.rounded)
    if not beyond <= tolerance:
        raise RuntimeError(
            f"the merged model, loaded again, has other logits than PEFT's own merge: they differ by up to "
            f"{beyond:.2e}, more than rounding explains ({tolerance:.2e}); nothing was written"
        )
    return found


def _largest(logits: torch.Tensor) -> float:
    return float(logits.abs().max())
