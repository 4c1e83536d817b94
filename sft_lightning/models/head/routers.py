"""What keeps the experts of a mixture evenly used: the load-balancing loss of its routers.

Each family has its own copy of one function (Fedus et al., 2022, arXiv:2101.03961, equations 4 to 6); here it is called
on the router logits that decoder and model return alike, so that a model's own head need not run for it, and over the
tokens of documents only: padding all looks the same, and would count as one overused expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sft_lightning.compat.transformers import balancing_loss_of
from sft_lightning.models.inspection import base_model
from sft_lightning.types import IGNORE_INDEX, DocumentLength, num_tokens


@dataclass(frozen=True)
class RouterLoss:
    """The routers' loss of a mixture of experts."""

    balance: Callable[..., torch.Tensor]
    """The family's own `load_balancing_loss_func`."""

    num_experts: int
    top_k: int
    """Experts that each token goes to."""

    coefficient: float
    """`router_aux_loss_coef`: what the loss is multiplied by."""

    def __call__(self, outputs: Any, counted: torch.Tensor | None = None) -> torch.Tensor:
        """Return the loss, coefficient included, float32 scalar.

        Args:
            outputs: What the model or its decoder returned; `router_logits` has (B · S, experts) for each layer.
            counted: Tokens that count, (B, S); `None`: all.
        """
        loss = self.balance(outputs.router_logits, self.num_experts, self.top_k, counted)
        return self.coefficient * loss


def find_router_loss(model: PreTrainedModel | PeftModel) -> RouterLoss | None:
    """Return the routers' loss of a model whose configuration asks for it; `None` if it has none, or one of its own."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return None  # its virtual tokens go through the routers too
    base: Any = base_model(model)
    config = base.config.get_text_config()
    balance = balancing_loss_of(base)
    num_experts, top_k = (getattr(base, name, None) for name in ("num_experts", "num_experts_per_tok"))
    if not getattr(config, "output_router_logits", False) or None in (balance, num_experts, top_k):
        return None
    return RouterLoss(cast("Any", balance), cast("int", num_experts), cast("int", top_k), config.router_aux_loss_coef)


def tokens_of_documents(labels: torch.Tensor, document_lengths: Sequence[Sequence[DocumentLength]]) -> torch.Tensor:
    """Return which tokens of a micro-batch are not padding, (B, S); all, where there is nothing but padding.

    Args:
        labels: Aligned labels, (B, S); a row's padding is its last document and has none.
        document_lengths: Tokens of each document of each row.
    """
    counted = torch.ones_like(labels, dtype=torch.bool)
    for row, lengths in enumerate(document_lengths):
        last = slice(labels.shape[1] - num_tokens(lengths[-1]), None)
        counted[row, last] = (labels[row, last] != IGNORE_INDEX).any()
    return counted | ~counted.any()
