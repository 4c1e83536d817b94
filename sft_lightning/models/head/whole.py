"""Separate the decoder and the output head of a model, so that logits need not exist for all positions at once.

Some families scale or cap the output of the head, as their configuration says. That decoder and head together give the
model's own logits is verified on the loaded model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from sft_lightning.compat.peft import module_saved_in_full
from sft_lightning.models.head.routers import find_router_loss
from sft_lightning.models.inspection import base_model, evaluating, has_virtual_tokens


@dataclass(frozen=True)
class Head:
    """The decoder and the output head of a model."""

    decoder: Callable[..., Any]
    """The model without its head; its output has `last_hidden_state`, (B, S, D)."""

    module: nn.Module
    """The output embedding, (…, D) → (…, V)."""

    scale: float
    """Factor on the output of the module."""

    softcap: float | None
    """Logits become softcap · tanh(logits / softcap); `None` for no cap."""

    @property
    def linear(self) -> nn.Linear | None:
        """The module, if it is a plain linear layer; `None` if an adapter is wrapped around it."""
        module = module_saved_in_full(self.module) or self.module
        return module if type(module) is nn.Linear else None

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states, (…, D) → (…, V)."""
        logits: torch.Tensor = self.module(hidden)
        logits = logits * self.scale if self.scale != 1.0 else logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def find_head(model: PreTrainedModel | PeftModel, vocab_size: int, device: torch.device) -> Head | None:
    """Return the model's decoder and head, if together they give the model's own logits.

    Args:
        model: The model, adapters included; for a sharded one, use `find_sharded_head`.
        vocab_size: Random token ids of the probe are below it.
        device: The model's device.

    Returns:
        The head; `None` if the model computes its logits, or the loss of its routers, in another way.
    """
    if has_virtual_tokens(model):
        return None  # PEFT's forward puts virtual tokens before the text
    base = base_model(model)
    output, decoder = base.get_output_embeddings(), base.base_model
    if output is None or decoder is base:
        return None
    config = base.config.get_text_config()
    if getattr(config, "output_router_logits", False) and find_router_loss(base) is None:
        return None  # only the model's own forward knows the loss of its routers
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    head = Head(decoder, output, scale, getattr(config, "final_logit_softcapping", None))
    return head if _gives_the_models_logits(base, head, vocab_size, device) else None


@torch.no_grad()
def _gives_the_models_logits(model: PreTrainedModel, head: Head, vocab_size: int, device: torch.device) -> bool:
    ids = torch.randint(vocab_size, (1, 8), generator=torch.Generator().manual_seed(0)).to(device)
    inputs = {
        "input_ids": ids,
        "position_ids": torch.arange(8, device=device)[None],
        "document_lengths": [[8]],
        "use_cache": False,
    }
    with evaluating(model):
        own, below = model(**inputs), head.decoder(**inputs)
        expected, found = own.logits, head.project(below.last_hidden_state)
        routers = find_router_loss(model)
        if routers is not None and not torch.allclose(routers(below), routers.coefficient * own.aux_loss):
            return False
    if expected.shape != found.shape:
        return False
    rounding = 4 * torch.finfo(found.dtype).eps * float(expected.abs().max())
    return float((expected - found).abs().max()) <= rounding
