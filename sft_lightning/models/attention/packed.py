"""Packed attention for any device: documents that share a row do not see each other.

The function is registered with transformers under the name `packed`, without a mask function, so transformers builds no
mask. The document lengths of the batch arrive as a keyword argument of the model's forward, through PEFT and gradient
checkpointing. Attention is computed for each document separately: on the CPU this is 5 times faster than one
block-diagonal mask, and takes no memory for a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from sft_lightning.compat.torch import attend_within_documents
from sft_lightning.errors import UserError
from sft_lightning.types import DocumentLength, SharedPrompt, num_tokens

PACKED = "packed"
"""The name under which the function is registered with transformers."""


class HiddenLengths:
    """Document lengths that are opaque to torch.compile, which would otherwise compile again for each set of them."""

    def __init__(self, lengths: Sequence[Sequence[DocumentLength]]) -> None:
        self.lengths = lengths


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_lengths: Sequence[Sequence[DocumentLength]] | HiddenLengths | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document.

    Args:
        module: The attention layer.
        query: (B, heads, S, head_dim).
        key: (B, key_value_heads, S, head_dim).
        value: (B, key_value_heads, S, head_dim).
        attention_mask: Ignored; the documents define the mask.
        scaling: Factor on the scores; default: 1/sqrt(head_dim).
        dropout: Dropout probability of the attention weights.
        document_lengths: Tokens of each document of each row, adding up to S; of two documents that begin alike, a
            `SharedPrompt`. `None`: every row is one document.
        sliding_window: Number of tokens that a token sees, itself included; `None`: all before it.
        softcap: Scores become softcap · tanh(score / softcap).
        kwargs: Further arguments that transformers passes; `s_aux` is refused, the others are ignored.

    Returns:
        (B, S, heads, head_dim), and no attention weights.

    Raises:
        UserError: If the layer has attention sinks (`s_aux`), which this function does not compute.
    """
    if kwargs.get("s_aux") is not None:
        raise UserError(
            "model.attn_implementation: packed attention does not support attention sinks; set eager, and "
            "data.packing: none"
        )
    if isinstance(document_lengths, HiddenLengths):
        document_lengths = document_lengths.lengths
    if document_lengths is None:
        document_lengths = [[query.shape[2]]] * query.shape[0]
    if query.is_cuda and softcap is None and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0:
        return _varlen(query, key, value, document_lengths, scaling, sliding_window), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    options = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "softcap": softcap}
    rows = []
    for r, lengths in enumerate(document_lengths):
        parts = [torch.split(x[r : r + 1], [num_tokens(n) for n in lengths], dim=2) for x in (query, key, value)]
        documents = [_attend(q, k, v, length, options) for q, k, v, length in zip(*parts, lengths, strict=True)]
        rows.append(torch.cat(documents, dim=2))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: DocumentLength, options: dict[str, Any]
) -> torch.Tensor:
    """Causal attention of one document, or of two with a shared prompt; (1, heads, L, head_dim) in and out."""
    if not isinstance(length, SharedPrompt):
        return _document(query, key, value, **options)
    end = length.common + length.first
    first = _document(query[:, :, :end], key[:, :, :end], value[:, :, :end], **options)
    k, v = (torch.cat([x[:, :, : length.common], x[:, :, end:]], dim=2) for x in (key, value))
    return torch.cat([first, _document(query[:, :, end:], k, v, **options)], dim=2)


def _document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention of the last L tokens of a document to the whole document; (1, heads, L, head_dim) out."""
    length = query.shape[2]
    before = key.shape[2] - length
    windowed = sliding_window is not None and sliding_window < key.shape[2]
    if softcap is None and not windowed and not before:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling, is_causal=True)
    mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril(before)
    if windowed:
        mask = mask.triu(before + 1 - sliding_window)  # type: ignore[operator]
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
    return weights @ value


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    document_lengths: Sequence[Sequence[DocumentLength]],
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attend within all documents by one FlashAttention kernel (torch >= 2.10); (B, S, heads, head_dim) out."""
    batch, heads, width, head_dim = query.shape
    flat = [length for lengths in document_lengths for length in lengths]
    q, k, v = (x.transpose(1, 2).reshape(batch * width, x.shape[1], head_dim) for x in (query, key, value))
    query_lengths = key_lengths = [num_tokens(length) for length in flat]
    if any(isinstance(length, SharedPrompt) for length in flat):
        query_lengths, key_lengths, key_slices = split_shared_prompts(flat)
        k, v = (torch.cat([x[each] for each in key_slices]) for x in (k, v))
    query_starts, key_starts = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=query.device)
        for lengths in (query_lengths, key_lengths)
    )
    options: dict[str, Any] = {"scale": scaling, "window_size": ((sliding_window or 0) - 1, 0)}
    longest = (max(query_lengths), max(key_lengths))
    out = attend_within_documents(q, k, v, (query_starts, key_starts), longest, **options)
    return out.view(batch, width, heads, head_dim)


def split_shared_prompts(
    lengths: Sequence[DocumentLength],
) -> tuple[list[int], list[int], list[slice]]:
    """Split documents with a shared prompt into two, whose keys and values both include the prompt.

    Args:
        lengths: Lengths of all documents of all rows, in order.

    Returns:
        The number of query tokens of each document, its number of key tokens, and the slices of the flat keys which,
        concatenated, are the keys of all documents.
    """
    query_lengths: list[int] = []
    key_lengths: list[int] = []
    key_slices: list[slice] = []
    start = 0
    for length in lengths:
        end = start + num_tokens(length)
        if isinstance(length, SharedPrompt):
            rest = start + length.common + length.first
            query_lengths += [rest - start, end - rest]
            key_lengths += [rest - start, length.common + end - rest]
            key_slices += [slice(start, rest), slice(start, start + length.common), slice(rest, end)]
        else:
            query_lengths.append(length)
            key_lengths.append(length)
            key_slices.append(slice(start, end))
        start = end
    return query_lengths, key_lengths, key_slices


AttentionInterface.register(PACKED, packed_attention)
