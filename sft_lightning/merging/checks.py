"""What a merged model is held against: the base under its adapters, and the model as it was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from sft_lightning.errors import UserError
from sft_lightning.merging.base import MergePlan
from sft_lightning.merging.peft_reference import ReferenceLogits
from sft_lightning.merging.quantized import QuantizedBase
from sft_lightning.models.inspection import max_positions
from sft_lightning.models.probing import answers, cut_rows, text_rows


@dataclass(frozen=True)
class Difference:
    """What was measured on the folder that was written, loaded again, on a probe."""

    largest: float
    """Largest difference between the merged and the adapted model's logits."""

    scale: float
    """Largest absolute logit of the adapted model."""

    moved: float
    """Largest difference between the merged and the base model's logits: what the adapters changed."""


def check_answers(reference: ReferenceLogits, merged: torch.Tensor) -> Difference:
    """Return how far the written model is from the adapted one.

    Args:
        reference: By plain PEFT.
        merged: (B, S, vocabulary) logits of the written model.

    Raises:
        RuntimeError: If more than rounding is between them, or PEFT's own merge does not answer like the adapter.
    """
    found = Difference(
        largest=_largest(merged - reference.adapted),
        scale=_largest(reference.adapted),
        moved=_largest(merged[..., : reference.base.shape[-1]] - reference.base),
    )
    exact = 1e-4 * max(found.scale, found.moved)
    if not _largest(reference.merged - reference.adapted) <= 10 * exact:  # not-a-number included
        raise RuntimeError(
            "merging changes what the model answers: with the adapter merged by PEFT, logits differ from those with "
            f"the adapter beside the base by up to {_largest(reference.merged - reference.adapted):.2e}; nothing was "
            "written"
        )
    # float32 sums in another order on the way through the layers, and tip the rounding of some weights the other way.
    rounding = _largest(reference.rounded - reference.adapted)
    tolerance = exact + rounding / 2
    beyond = _largest(merged - reference.rounded)
    if not beyond <= tolerance:
        raise RuntimeError(
            "the merged model, loaded again, answers otherwise than what PEFT merges: its logits differ by up to "
            f"{beyond:.2e}, more than rounding explains ({tolerance:.2e}); nothing was written"
        )
    return found


def _largest(logits: torch.Tensor) -> float:
    return float(logits.abs().max())


@dataclass
class Trained:
    """The trained model's answers, where it was quantized."""

    quantized: QuantizedBase | None = None
    """Its base; `None` if nothing is merged into that."""

    rows: list[list[int]] = field(default_factory=list)
    """Token ids that it was asked with."""

    answers: list[torch.Tensor] = field(default_factory=list)
    """Log-probabilities of the next token, (S, vocabulary) for each row."""


def ask_trained(
    plan: MergePlan,
    choices: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Sequence[Sequence[int]] | None,
) -> Trained:
    """Load the quantized base where a choice needs it, and note the trained model's answers where they are compared.

    Args:
        plan: What is merged into what.
        choices: `original`, `dequantized`, or both, to be compared.
        tokenizer: For the built-in texts.
        rows: Token ids to compare on, instead of those texts.

    Raises:
        UserError: If there is nothing to compare on.
    """
    if "dequantized" not in choices:
        return Trained()
    quantized = QuantizedBase(plan)
    if len(choices) == 1:
        return Trained(quantized)
    if not rows and tokenizer is None:
        raise UserError(f"merge --base: no tokenizer in {plan.adapters[-1]} or {plan.folder} to measure with; set it")
    used = cut_rows(rows or text_rows(tokenizer), max_length=min(256, max_positions(plan.config)))  # type: ignore[arg-type]
    return Trained(quantized, used, answers(quantized.trained(plan), used))
