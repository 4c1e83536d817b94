"""Packed attention for any device: documents that share a row do not see each other.

The function is registered with transformers under the name `packed`, without a mask function, so transformers builds no
mask. The documents of the batch arrive as a keyword argument of the model's forward, through PEFT and gradient
checkpointing. On the CPU each document is computed by itself, which is 5 times faster than one block-diagonal mask, and
takes no memory for a mask; `paths.py` decides for GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from sft_lightning.batch import DocumentLengths
from sft_lightning.errors import UserError
from sft_lightning.models.attention.kernels import KERNELS
from sft_lightning.models.attention.paths import AttentionPath, path_of_call
from sft_lightning.models.attention.per_document import attend_each, attend_per_document
from sft_lightning.types import DocumentLength

PACKED = "packed"
"""The name under which the function is registered with transformers."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_lengths: DocumentLengths | Sequence[Sequence[DocumentLength]] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document.

    Args:
        module: The attention layer.
        query: (B, heads, S, head_dim).
        key: (B, key_value_heads, S, head_dim).
        value: (B, key_value_heads, S, value_dim); queries and keys are cast to its type.
        attention_mask: Ignored; the documents define the mask.
        scaling: Factor on the scores; default: 1/sqrt(head_dim).
        dropout: Dropout probability of the attention weights.
        document_lengths: Tokens of each document of each row, adding up to S; of two documents that begin alike, a
            `SharedPrompt`. Training passes `DocumentLengths`, which has all that the kernels need; plain lists are
            made into one here, in every layer. `None`: every row is one document.
        sliding_window: Number of tokens that a token sees, itself included; `None`: all before it.
        softcap: Scores become softcap · tanh(score / softcap).
        kwargs: Further arguments that transformers passes; `s_aux` is refused, the others are ignored.

    Returns:
        (B, S, heads, value_dim), and no attention weights.

    Raises:
        UserError: If the layer has attention sinks (`s_aux`), which this function does not compute.
    """
    if kwargs.get("s_aux") is not None:
        raise UserError(
            "model.attn_implementation: packed attention does not support attention sinks; set eager, and "
            "data.packing: none"
        )
    batch, heads, width, head_dim = query.shape
    if not isinstance(document_lengths, DocumentLengths):
        document_lengths = DocumentLengths(document_lengths or [[width]] * batch).to(query.device)
    # Rotary embeddings in float32 leave queries and keys in float32 under autocast, which no kernel takes.
    query, key = query.to(value.dtype), key.to(value.dtype)
    path = path_of_call(
        query.device, value.dtype, head_dim, value.shape[-1], heads != key.shape[1], bool(softcap), bool(dropout)
    )
    q, k, v = (x.transpose(1, 2).reshape(batch * width, x.shape[1], x.shape[3]) for x in (query, key, value))
    if document_lengths.key_index is not None:
        k, v = (x.index_select(0, document_lengths.key_index) for x in (k, v))
    options: dict[str, Any] = {
        "scale": head_dim**-0.5 if scaling is None else float(scaling),
        "window": sliding_window or 0,
        "softcap": float(softcap or 0.0),
    }
    if path.kernel != "per_document":
        out = _by_kernel(path, q, k, v, document_lengths, dropout=dropout, **options)
    elif torch.compiler.is_compiling() and not dropout:
        out = attend_per_document(q, k, v, document_lengths.cpu_starts, **options)
    else:
        out = _each(q, k, v, document_lengths.lengths, dropout=dropout, **options)
    return out.view(batch, width, heads, value.shape[-1]), None


# The operator computes a document again in its backward pass: slower than autograd, and with other weights dropped.
_each = torch.compiler.disable(attend_each)


def _by_kernel(
    path: AttentionPath,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: DocumentLengths,
    *,
    scale: float,
    window: int,
    softcap: float,
    dropout: float,
) -> torch.Tensor:
    """Attend within all documents by one kernel; (B · S, heads, value_dim) out."""
    value_dim = value.shape[-1]
    q, k, v = (F.pad(x, (0, path.width - x.shape[-1])) if x.shape[-1] < path.width else x for x in (query, key, value))
    out = KERNELS[path.kernel](q, k, v, documents, scale=scale, window=window, softcap=softcap, dropout=dropout)
    return out if path.width == value_dim else out[..., :value_dim].contiguous()


AttentionInterface.register(PACKED, packed_attention)
