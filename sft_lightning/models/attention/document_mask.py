"""Documents kept apart by a mask, for families that do their own attention: BLOOM, Falcon, GPT-Neo and the like.

Such a model calls no registered attention function, so ours never reaches it; but it asks transformers for a causal
mask. That mask is made here: causal, and within each document. It costs what such models spend anyway, one float for
every pair of tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)

from sft_lightning.compat.transformers import attention_of, calls_registered_attention, set_attention
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.models.inspection import base_model

DOCUMENT_MASK = "document_mask"
"""Our name in transformers' registry of mask functions."""

_document_lengths: ContextVar[Sequence[Sequence[int]] | None] = ContextVar("document_lengths", default=None)
"""Documents of the rows that a model is looking at; not every model hands keyword arguments on to its masks."""


def choose_attention(requested: str, config: PretrainedConfig) -> str:
    """Return transformers' name of the attention to load a model with.

    Args:
        requested: `model.attn_implementation`.
        config: The model's.

    Returns:
        `requested`; for `auto` our packed attention, and `eager` where the family does its own.
    """
    if requested != "auto":
        return requested
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return PACKED if family is None or calls_registered_attention(family) else "eager"


def use_document_mask(model: PreTrainedModel | PeftModel) -> bool:
    """Let a model with its own attention see the documents of a row by its mask; others are left as they are.

    Args:
        model: The model, loaded with what `choose_attention` said; its adapter, if it gets one, on it.

    Returns:
        Whether there was anything to do.
    """
    base = base_model(model)
    config = base.config
    if attention_of(config) not in ("eager", DOCUMENT_MASK) or calls_registered_attention(base) or not _attends(base):
        return False
    set_attention(config, DOCUMENT_MASK)
    for module in {id(each): each for each in (model, base.base_model)}.values():
        module.register_forward_pre_hook(_note_documents, with_kwargs=True)
        module.register_forward_hook(_forget_documents, with_kwargs=True, always_call=True)
    return True


def document_mask(
    batch_size: int, q_length: int, kv_length: int, *, dtype: torch.dtype = torch.float32, **options: Any
) -> torch.Tensor:
    """Return a causal mask within documents, as transformers' `eager_mask` is: 0, or the lowest number of `dtype`.

    Args:
        batch_size: B.
        q_length: Tokens that look, S.
        kv_length: Tokens that are looked at; S, unless there is a cache.
        dtype: Of the mask.
        options: What else `eager_mask` takes.

    Returns:
        (B, 1, S, kv_length).
    """
    mask: torch.Tensor = AttentionMaskInterface()["eager"](
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, dtype=dtype, **options
    )
    lengths = _document_lengths.get()
    if lengths is None or q_length != kv_length:
        return mask
    rows = [[number for number, length in enumerate(row) for _ in range(length)] for row in lengths]
    documents = torch.tensor(rows, device=mask.device)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return torch.where(same, mask, torch.finfo(dtype).min)


def _attends(model: PreTrainedModel) -> bool:
    return any("attention" in type(module).__name__.lower() for module in model.modules())


def _note_documents(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if "document_lengths" in kwargs:
        _document_lengths.set(kwargs["document_lengths"])


def _forget_documents(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    if "document_lengths" in kwargs:
        _document_lengths.set(None)


# A model that reads its attention from the registry after all gets the one that heeds any mask.
AttentionInterface.register(DOCUMENT_MASK, AttentionInterface()["sdpa"])
AttentionMaskInterface.register(DOCUMENT_MASK, document_mask)
