"""Keep documents apart by a mask, for families that compute attention themselves, such as BLOOM, Falcon and GPT-Neo.

Such a model does not call a registered attention function, so `packed_attention` never runs; but it asks transformers
for a causal mask. This module makes that mask: causal within each document. It takes the memory that such models use
for their own mask anyway, one number for every pair of tokens of a row.
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

from sft_lightning.batch import DocumentLengths
from sft_lightning.compat.transformers import attention_of, calls_registered_attention, set_attention
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.models.inspection import base_model

DOCUMENT_MASK = "document_mask"
"""The name under which the mask function is registered with transformers."""

_document_lengths: ContextVar[Sequence[Sequence[int]] | None] = ContextVar("document_lengths", default=None)
"""Document lengths of the current forward pass: not every model passes keyword arguments on to its mask function."""


def choose_attention(requested: str, config: PretrainedConfig) -> str:
    """Return transformers' name of the attention to load a model with.

    Args:
        requested: `model.attn_implementation`.
        config: The model's configuration.

    Returns:
        `requested`; for `auto`, packed attention, or `eager` if the family computes attention itself.
    """
    if requested != "auto":
        return requested
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return PACKED if family is None or calls_registered_attention(family) else "eager"


def use_document_mask(model: PreTrainedModel | PeftModel) -> bool:
    """Give a model that computes attention itself masks that keep documents apart; change no other model.

    Args:
        model: The model, loaded with the attention of `choose_attention`, its adapter included.

    Returns:
        Whether the model uses the mask.
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
    """Return a causal mask within documents, in the form of transformers' `eager_mask`: 0, or the lowest number.

    Args:
        batch_size: Rows, B.
        q_length: Query tokens, S.
        kv_length: Key tokens; S, unless there is a cache.
        dtype: Type of the mask.
        options: Further arguments of `eager_mask`.

    Returns:
        (B, 1, S, kv_length).
    """
    mask: torch.Tensor = AttentionMaskInterface()["eager"](
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, dtype=dtype, **options
    )
    lengths = _document_lengths.get()
    if lengths is None or q_length != kv_length:
        return mask
    starts = (lengths if isinstance(lengths, DocumentLengths) else DocumentLengths(lengths).to(mask.device)).starts
    places = torch.arange(batch_size * q_length, device=mask.device).view(batch_size, q_length)
    documents = torch.searchsorted(starts[0], places, right=True)
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


# A model that reads the attention function from the registry after all gets SDPA, which applies any mask.
AttentionInterface.register(DOCUMENT_MASK, AttentionInterface()["sdpa"])
AttentionMaskInterface.register(DOCUMENT_MASK, document_mask)
