"""Diverse beam search (Vijayakumar et al., 2016, arXiv:1610.02424): groups of beams avoid each other's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedModel

from sft_lightning.models.generation.text_continuation import TextContinuation


def diverse_beam_search(
    model: PreTrainedModel | PeftModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    num_beams: int,
    num_beam_groups: int,
    diversity_penalty: float,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
) -> torch.Tensor:
    """Generate `num_beams` answers to each prompt; one group is beam search.

    A beam that has ended keeps its score until other beams are better. Within a group, answers are ordered by score per
    token.

    Args:
        model: The model, in evaluation mode.
        input_ids: Left-padded prompts, (B, S).
        attention_mask: 1 at tokens, 0 at padding, (B, S).
        num_beams: Number of beams of all groups together.
        num_beam_groups: Number of groups; divides `num_beams`.
        diversity_penalty: λ of the paper, for each time that an earlier group chose a token at the same step.
        max_new_tokens: Most tokens per answer.
        stop_token_ids: Tokens that end an answer.
        pad_token_id: Token that fills answers up.

    Returns:
        Answers, padded on the right, (B, num_beams, at most max_new_tokens): the best of each group, then the
        second best of each, and so on.
    """
    size, device = num_beams // num_beam_groups, input_ids.device
    shape = (len(input_ids), num_beam_groups, size)
    stops = torch.tensor(list(stop_token_ids), device=device)
    texts = TextContinuation(model, input_ids, attention_mask)
    texts.select(torch.arange(shape[0], device=device).repeat_interleave(num_beams))
    first_rows = torch.arange(shape[0] * num_beams, device=device).view(shape)[..., :1]
    scores = torch.full(shape, float("-inf"), device=device)
    scores[..., 0] = 0  # at first, all beams of a group are the same text: count it once
    answers = torch.empty((*shape, 0), dtype=torch.long, device=device)
    done = torch.zeros(shape, dtype=torch.bool, device=device)
    while answers.shape[-1] < max_new_tokens and not done.all():
        log_probabilities = _with_ends(F.log_softmax(texts.logits, -1).view(*shape, -1), done, pad_token_id)
        scores, parents, tokens = choose_next_tokens(scores, log_probabilities, done, diversity_penalty)
        answers = torch.cat(
            [answers.gather(2, parents[..., None].expand_as(answers)), tokens[..., None]],
            dim=-1,
        )
        done = done.gather(2, parents) | torch.isin(tokens, stops)
        texts.select((first_rows + parents).flatten())
        texts.feed(tokens.flatten())
    lengths = answers.shape[-1] - _num_after_end(answers, stops)
    order = (scores / lengths).argsort(dim=-1, descending=True)
    ordered = answers.gather(2, order[..., None].expand_as(answers))
    return ordered.transpose(1, 2).flatten(1, 2)


def choose_next_tokens(
    scores: torch.Tensor, log_probabilities: torch.Tensor, done: torch.Tensor, diversity_penalty: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the next token of every beam, group after group.

    Args:
        scores: Score of each beam, (B, groups, beams of a group).
        log_probabilities: Log-probabilities of each next token, (B, groups, beams, V).
        done: Which beams have ended, (B, groups, beams); their padding is not penalized in other groups.
        diversity_penalty: λ.

    Returns:
        New scores, the parent beam within the group, and the new token, each (B, groups, beams).
    """
    vocabulary = log_probabilities.shape[-1]
    used = torch.zeros_like(log_probabilities[:, 0, 0])
    chosen = []
    for group in range(scores.shape[1]):
        penalty = diversity_penalty * used[:, None] * ~done[:, group, :, None]
        totals = scores[:, group, :, None] + log_probabilities[:, group] - penalty
        best, index = totals.flatten(1).topk(scores.shape[2])
        parents, tokens = index // vocabulary, index % vocabulary
        used.scatter_add_(1, tokens, (~done[:, group].gather(1, parents)).to(used.dtype))
        chosen.append((best, parents, tokens))
    new_scores, new_parents, new_tokens = (torch.stack(parts, dim=1) for parts in zip(*chosen, strict=True))
    return new_scores, new_parents, new_tokens


def _with_ends(log_probabilities: torch.Tensor, done: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """Let beams that have ended continue with padding, at no cost."""
    ended = torch.full_like(log_probabilities[0, 0, 0], float("-inf"))
    ended[pad_token_id] = 0
    return torch.where(done[..., None], ended, log_probabilities)


def _num_after_end(answers: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    """Return the number of tokens after the stop token of each answer."""
    ends = torch.isin(answers, stops).cumsum(-1)
    return (ends.cumsum(-1) > 1).sum(-1)
