"""Contrastive search (Su et al., 2022, arXiv:2202.06417): likely tokens that are unlike the text before them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedModel

from sft_lightning.models.generation.text_continuation import TextContinuation


def contrastive_search(
    model: PreTrainedModel | PeftModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    top_k: int,
    penalty_alpha: float,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
) -> torch.Tensor:
    """Generate one answer to each prompt by contrastive search.

    Args:
        model: The model, in evaluation mode.
        input_ids: Left-padded prompts, (B, S).
        attention_mask: 1 at tokens, 0 at padding, (B, S).
        top_k: Number of candidates for each token.
        penalty_alpha: α of the paper: 0 is greedy search, 1 considers only the similarity.
        max_new_tokens: Most tokens per answer.
        stop_token_ids: Tokens that end an answer.
        pad_token_id: Token that fills answers up.

    Returns:
        Answers, padded on the right, (B, at most max_new_tokens).
    """
    texts = TextContinuation(model, input_ids, attention_mask, hidden=True)
    context = F.normalize(texts.hidden, dim=-1)
    rows = torch.arange(len(input_ids), device=input_ids.device)
    stops = torch.tensor(list(stop_token_ids), device=input_ids.device)
    done = torch.zeros_like(rows, dtype=torch.bool)
    answers: list[torch.Tensor] = []
    while len(answers) < max_new_tokens and not done.all():
        probabilities, candidates = texts.logits.softmax(-1).topk(top_k)
        seen = texts.mask.bool()
        texts.select(rows.repeat_interleave(top_k))
        texts.feed(candidates.flatten())
        states = F.normalize(texts.hidden[:, -1], dim=-1).unflatten(0, (-1, top_k))
        chosen = choose_candidates(probabilities, states, context, seen, penalty_alpha)
        texts.select(rows * top_k + chosen)
        context = torch.cat([context, states[rows, chosen][:, None]], dim=1)
        tokens = candidates[rows, chosen].masked_fill(done, pad_token_id)
        answers.append(tokens)
        done |= torch.isin(tokens, stops)
    return torch.stack(answers, dim=1)


def choose_candidates(
    probabilities: torch.Tensor, states: torch.Tensor, context: torch.Tensor, seen: torch.Tensor, penalty_alpha: float
) -> torch.Tensor:
    """Choose the candidate v of each row that maximizes (1 − α) · p(v) − α · max over tokens j before of cos(h_v, h_j).

    Args:
        probabilities: p of the candidates, (B, K).
        states: Unit states of the candidates, (B, K, H).
        context: Unit states of the tokens before, (B, T, H).
        seen: Which of these are tokens, not padding, (B, T).
        penalty_alpha: α.

    Returns:
        Indices of candidates, (B,).
    """
    similarity = (states @ context.transpose(1, 2)).masked_fill(~seen[:, None], float("-inf")).amax(-1)
    return ((1 - penalty_alpha) * probabilities - penalty_alpha * similarity).argmax(-1)
