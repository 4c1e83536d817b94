"""How likely a model finds a reference answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sft_lightning.comparison.prompts import ComparisonPrompt
from sft_lightning.models.generation.serving import ServedModel


class ReferenceLoss(NamedTuple):
    """Cross entropy of a reference answer."""

    nats: float
    """Sum over its tokens."""

    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean, `inf` where that overflows."""
        return _exp(self.nats / self.num_tokens)


def mean_perplexity(losses: Sequence[ReferenceLoss]) -> float | None:
    """Return the perplexity over all tokens of several references; `None` if there is none."""
    tokens = sum(loss.num_tokens for loss in losses)
    return _exp(sum(loss.nats for loss in losses) / tokens) if tokens else None


@torch.no_grad()
def reference_loss(served: ServedModel, prompt: ComparisonPrompt, prompt_ids: Sequence[int]) -> ReferenceLoss | None:
    """Return the loss of a prompt's reference answer, given the prompt; its stop token is not counted.

    Args:
        served: The model.
        prompt: The prompt; its reference is not `None`.
        prompt_ids: The prompt as this model is asked.

    Returns:
        `None` if the reference has no token, or the chat template writes it where the model would not.
    """
    text = _answer_text(served, prompt)
    answer: list[int] = served.tokenizer(text, add_special_tokens=False).input_ids if text else []
    if not answer:
        return None
    device = next(served.model.parameters()).device
    ids = torch.tensor([[*prompt_ids, *answer]], device=device)
    logits = served.model(input_ids=ids, use_cache=False).logits[0, -len(answer) - 1 : -1].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, -len(answer) :], reduction="sum")
    return ReferenceLoss(float(loss), len(answer))


def _answer_text(served: ServedModel, prompt: ComparisonPrompt) -> str | None:
    """Return the reference as the model would have to write it after the prompt."""
    reference = (prompt.reference or "").strip()
    if not served.has_template or prompt.is_plain:
        # A colon is followed by a space in scripts that have spaces.
        space = prompt.text[-1:].isascii() and not prompt.text[-1:].isspace()
        return (" " if space else "") + reference if reference else None
    whole = str(
        served.tokenizer.apply_chat_template(
            [*(dict(turn) for turn in prompt.turns), {"role": "assistant", "content": reference}], tokenize=False
        )
    )
    before = served.render(prompt.turns)
    start = whole.find(reference, len(before))
    if not reference or start < 0 or not whole.startswith(before):
        return None
    return whole[len(before) : start + len(reference)]


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
