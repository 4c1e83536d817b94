"""Token ids for probing models, the logits that they return, and how far two outputs differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

PROBE_TEXTS = (
    "The opposite of hot is cold, and the opposite of early is late. Water boils at 100 degrees Celsius at sea level.",
    "Question: What is the capital of France?\nAnswer: The capital of France is Paris, a city on the river Seine.",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n",
    "Write a short letter to a friend.\n\nDear Anna,\n\nthank you for your letter. I was glad to hear from you.",
)
"""Texts for a comparison where the run's own data is not available."""


def random_ids(vocab_size: int, *, rows: int, length: int) -> torch.Tensor:
    """Return the same random token ids at every call, (rows, length).

    Args:
        vocab_size: Ids are below it.
        rows: Number of rows.
        length: Tokens per row.
    """
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


def tokenize_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] = PROBE_TEXTS) -> list[list[int]]:
    """Return the token ids of each text.

    Args:
        tokenizer: A tokenizer.
        texts: What to tokenize.
    """
    return [tokenizer(text).input_ids for text in texts]


def truncate_rows(rows: Sequence[Sequence[int]], max_tokens: int = 512, max_length: int = 256) -> list[list[int]]:
    """Return the first rows, truncated, so that their logits fit in memory.

    Args:
        rows: Token ids.
        max_tokens: Tokens of all rows together.
        max_length: Tokens per row.
    """
    cut: list[list[int]] = []
    for row in rows:
        room = max_tokens - sum(map(len, cut))
        if room > 1 and len(row) > 1:
            cut.append(list(row[: min(max_length, room)]))
    return cut


@torch.no_grad()
def logits_of(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Return float32 logits, (B, S, vocabulary).

    Args:
        model: A causal language model.
        input_ids: Token ids, (B, S).
    """
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits.float()


def next_token_log_probs(model: torch.nn.Module, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return the log-probabilities of the next token, (S, vocabulary) for each row.

    Args:
        model: A causal language model.
        rows: Token ids.
    """
    return [torch.log_softmax(logits_of(model, torch.tensor([list(row)]))[0], dim=-1) for row in rows]


def mean_divergence(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Return KL(reference ‖ other) in nats per token, the mean over all positions of all rows.

    If `other` has more tokens in its vocabulary, such as padding rows, they are left out.

    Args:
        reference: Log-probabilities, (S, vocabulary) for each row.
        other: Log-probabilities, (S, vocabulary or more) for each row.
    """
    total = 0.0
    for p, q in zip(reference, other, strict=True):
        log_p, log_q = (torch.log_softmax(x[:, : p.shape[1]].double(), -1) for x in (p, q))
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / sum(len(p) for p in reference)
