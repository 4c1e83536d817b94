"""Check merged weights against `base + scale · B A`, read from the files without PEFT.

Logits tell whether a model answers as it should; a merge without `alpha / r`, or into the wrong one of two bases, can
answer almost alike. A few weights that are computed again from the files tell the difference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sft_lightning.merging.layers import empty_model
from sft_lightning.merging.plan import MergePlan
from sft_lightning.merging.quantized import QuantizedBase
from sft_lightning.merging.report import MergeBase
from sft_lightning.models.adapters.folder import CHANGE_BASE, method_name, name_in_base, read_config, read_weights
from sft_lightning.models.base.weight_files import read_named_tensors

_NUM_WEIGHTS = 3
"""Weights that are compared, spread over the model."""

_INPUTS = 64
"""Columns of a dequantized weight that are compared: each costs a forward pass of its layer on one token."""


@dataclass(frozen=True)
class Update:
    """The update of one weight by one LoRA adapter."""

    a: torch.Tensor
    """A, float32 (r, in)."""

    b: torch.Tensor
    """B, float32 (out, r)."""

    scale: float
    """alpha / r, or alpha / √r with rank-stabilized LoRA."""

    def delta(self) -> torch.Tensor:
        """Return the update, float32 (out, in)."""
        return self.scale * (self.b @ self.a)


def lora_updates(folder: Path) -> dict[str, Update]:
    """Return the updates of a plain LoRA adapter, by the name of the base's layer; empty for other methods.

    Args:
        folder: The adapter's folder.
    """
    config = read_config(folder)
    if method_name(config) != "LORA" or config.use_dora or config.init_lora_weights in CHANGE_BASE:
        return {}
    weights = read_weights(folder)
    found: dict[str, Update] = {}
    for key, a in weights.items():
        b = weights.get(key.replace(".lora_A.", ".lora_B."))
        if ".lora_A." in key and b is not None and a.dim() == b.dim() == 2:
            layer = name_in_base(key.partition(".lora_A.")[0])
            scale = _alpha(config, layer) / (math.sqrt(len(a)) if config.use_rslora else len(a))
            found[layer] = Update(a.float(), b.float(), scale)
    return found


def _alpha(config: Any, layer: str) -> float:
    """Return a layer's alpha: that of the first pattern that its name ends with, else the adapter's."""
    patterns: Mapping[str, float] = config.alpha_pattern or {}
    own = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", layer))
    return float(next(own, config.lora_alpha))


def verify_weights(plan: MergePlan, folder: Path, into: MergeBase, quantized: QuantizedBase | None) -> int:
    """Compute a few merged weights again, and compare them with the written ones.

    Args:
        plan: The merge plan.
        folder: The written candidate.
        into: The base that it is to be merged into, by name: not by what the merge took for it.
        quantized: The dequantized base; `None` if nothing is merged into it.

    Returns:
        How many weights were compared; 0 if an adapter is not plain LoRA, or the files have other names than the model.

    Raises:
        RuntimeError: If a written weight is another one.
    """
    updates = [lora_updates(adapter) for adapter in plan.adapters]
    if not all(updates):
        return 0
    layers = _spread(sorted({layer for each in updates for layer in each}))
    names = [f"{layer}.weight" for layer in layers]
    base, merged = read_named_tensors(plan.folder, names), read_named_tensors(folder, names)
    model = empty_model(plan.config, vocab_size=plan.vocab_sizes[-1], trust_remote_code=plan.trust_remote_code)
    compared = 0
    for layer, name in zip(layers, names, strict=True):
        deltas = [each[layer].delta() for each in updates if layer in each]
        if name not in base or name not in merged:
            continue
        before, after = (_as_linear(model, layer, each[name]) for each in (base, merged))
        if any(delta.shape != before.shape or delta.shape != after.shape for delta in deltas):
            continue  # such as a head that got rows for new tokens
        rounding = 0.0
        if into == "dequantized" and quantized is not None and name in quantized.names:
            before, rounding = quantized.columns(name, _INPUTS), quantized.rounding
        _compare(f"{name} is not that of the {into} base", before, sum(deltas, torch.zeros(())), after, rounding)
        compared += 1
    return compared


def _spread(names: Sequence[str]) -> list[str]:
    """Return the first, the middle and the last name."""
    last = len(names) - 1
    return sorted({names[round(last * at / (_NUM_WEIGHTS - 1))] for at in range(_NUM_WEIGHTS)})


def _as_linear(model: PreTrainedModel, layer: str, weight: torch.Tensor) -> torch.Tensor:
    """Return a stored weight as (out, in); GPT-2 stores (in, out)."""
    return weight.T if isinstance(model.get_submodule(layer), Conv1D) else weight


def _compare(what: str, before: torch.Tensor, delta: torch.Tensor, after: torch.Tensor, rounding: float) -> None:
    """Compare a merged weight with its base and update; `rounding` is the relative error of `before`."""
    columns = slice(before.shape[1])
    expected = before.float() + delta[:, columns]
    # Rounded once to the written type; the columns of a quantized layer were rounded when it computed them.
    tolerance = (torch.finfo(after.dtype).eps + 1e-6) * expected.abs().amax(dim=1, keepdim=True)
    tolerance = tolerance + rounding * before.abs().amax(dim=1, keepdim=True)
    apart = (after[:, columns].float() - expected).abs()
    if not bool((apart <= tolerance).all()):  # not-a-number included
        raise RuntimeError(
            f"the merged weight {what} plus alpha / r · B A: it differs by up to {float(apart.max()):.2e} (at most "
            f"{float(tolerance.max()):.2e}); nothing was written"
        )
