"""Perplexity of a reference answer under a model."""

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
    """Sum over the tokens of the reference, in nats."""

    num_tokens: int
    """Tokens of the reference."""

    @property
    def perplexity(self) -> float:
        """exp of the mean cross entropy; `inf` if that overflows."""
        return _exp(self.nats / self.num_tokens)


def mean_perplexity(losses: Sequence[ReferenceLoss]) -> float | None:
    """Return the perplexity over all tokens of several references; `None` if there are no references."""
    tokens = sum(loss.num_tokens for loss in losses)
    return _exp(sum(loss.nats for loss in losses) / tokens) if tokens else None


@torch.no_grad()
def reference_loss(served: ServedModel, prompt: ComparisonPrompt, prompt_ids: Sequence[int]) -> ReferenceLoss | None:
    """Return the loss of a prompt's reference answer given the prompt, without the stop token.

    Args:
        served: The model.
        prompt: A prompt whose reference is not `None`.
        prompt_ids: Token ids of the prompt, rendered for this model.

    Returns:
        `None` if the reference has no tokens, or if the chat template does not render it after the prompt.
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
    """Return the reference with the white space that the model would have to generate after the prompt."""
    reference = (prompt.reference or "").strip()
    if not served.has_template or prompt.is_plain:
        # In scripts that use spaces, a space follows the colon.
        space = prompt.text[-1:].isascii() and not prompt.text[-1:].isspace()
        return (" " if space else "") + reference if reference else None
    whole = str(
        served.tokenizer.apply_chat_template(
            [*(dict(message) for message in prompt.messages), {"role": "assistant", "content": reference}],
            tokenize=False,
        )
    )
    before = served.render(prompt.messages)
    start = whole.find(reference, len(before))
    if not reference or start < 0 or not whole.startswith(before):
        return None
    return whole[len(before) : start + len(reference)]


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
