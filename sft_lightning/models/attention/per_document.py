"""Attention of each document by itself, on any device, as one operator of torch.

To torch.compile it is a single node of the graph, whatever the documents' lengths are, so that compiled layers have no
graph break and are compiled once. The backward pass computes the scores of a document again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_BACKWARD = "attend_per_document_backward"


@torch.library.custom_op("sft_lightning::attend_per_document", mutates_args=())
def attend_per_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """Compute causal attention within each document.

    Args:
        query: (Tq, heads, head_dim), the documents one after the other.
        key: (Tk, key/value heads, head_dim).
        value: (Tk, key/value heads, value_dim).
        starts: Where each document starts among queries and keys, and where the last one ends, (2, N + 1) int32 in CPU
            memory. A document's queries are the last of its keys.
        scale: Factor on the scores.
        window: Number of tokens that a token sees, itself included; 0: all before it.
        softcap: Scores become softcap · tanh(score / softcap); 0: no cap.

    Returns:
        (Tq, heads, value_dim).
    """
    return attend_each(query, key, value, _lengths(starts), scale=scale, window=window, softcap=softcap)


@attend_per_document.register_fake
def _shape(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


def _gradients(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients with respect to queries, keys and values; `grad` is that of the result."""
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        out = attend_each(q, k, v, _lengths(starts), scale=scale, window=window, softcap=softcap)
        of_query, of_key, of_value = torch.autograd.grad(out, (q, k, v), grad)
    return of_query.contiguous(), of_key.contiguous(), of_value.contiguous()


def _shapes_of_gradients(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    of_query, of_key, of_value = (x.new_empty(x.shape) for x in (query, key, value))
    return of_query, of_key, of_value


# Not a `custom_op`: it would switch autograd off, which this one uses inside. Nothing differentiates it.
_library = torch.library.Library("sft_lightning", "FRAGMENT")
_library.define(f"{_BACKWARD}{torch.library.infer_schema(_gradients, mutates_args=())}")
_library.impl(_BACKWARD, torch.library.fallthrough_kernel, "Autograd")
_library.impl(_BACKWARD, _gradients, "CompositeExplicitAutograd")
torch.library.register_fake(f"sft_lightning::{_BACKWARD}", _shapes_of_gradients, lib=_library)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    query, key, value, starts, ctx.scale, ctx.window, ctx.softcap = inputs
    ctx.save_for_backward(query, key, value, starts)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grads = torch.ops.sft_lightning.attend_per_document_backward(
        grad, *ctx.saved_tensors, ctx.scale, ctx.window, ctx.softcap
    )
    return *grads, None, None, None, None


attend_per_document.register_autograd(_backward, setup_context=_keep)


def _lengths(starts: torch.Tensor) -> tuple[list[int], list[int]]:
    queries, keys = starts.diff().tolist()
    return queries, keys


def attend_each(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[list[int], list[int]],
    *,
    scale: float,
    window: int,
    softcap: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Compute causal attention document by document, by operations that autograd follows.

    Args:
        query: As in `attend_per_document`, as all that follow.
        key: (Tk, key/value heads, head_dim).
        value: (Tk, key/value heads, value_dim).
        lengths: Tokens of each document, among queries and among keys.
        scale: Factor on the scores.
        window: Number of tokens that a token sees; 0: all before it.
        softcap: Bound of the scores; 0: none.
        dropout: Probability of dropping an attention weight.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    parts = [
        x.transpose(0, 1)[None].split(each, dim=2)
        for x, each in zip((query, key, value), (lengths[0], lengths[1], lengths[1]), strict=True)
    ]
    documents = [
        _document(q, k, v, scale=scale, window=window, softcap=softcap, dropout=dropout)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(documents, dim=2)[0].transpose(0, 1).contiguous()


def _document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    window: int,
    softcap: float,
    dropout: float,
) -> torch.Tensor:
    """Causal attention of the last L tokens of a document to the whole document; (1, heads, L, value_dim) out."""
    length = query.shape[2]
    before = key.shape[2] - length
    windowed = 0 < window < key.shape[2]
    if not softcap and not windowed and not before:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale, is_causal=True)
    mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril(before)
    if windowed:
        mask = mask.triu(before + 1 - window)
    if not softcap:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
    scores = query @ key.transpose(2, 3) * scale
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
    return weights @ value
