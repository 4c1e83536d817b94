"""The load-balancing loss of a mixture of experts, which keeps its experts evenly used.

Each family has a copy of the same function (Fedus et al., 2022, arXiv:2101.03961, equations 4 to 6). It is called here
on the router logits, which the decoder returns without running the model's head, and only for tokens of documents:
padding tokens are all alike, and would count as one overused expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sft_lightning.batch import DocumentLengths
from sft_lightning.compat.transformers import balancing_loss_of
from sft_lightning.models.inspection import base_model, has_virtual_tokens
from sft_lightning.types import IGNORE_INDEX, DocumentLength, num_tokens


@dataclass(frozen=True)
class RouterLoss:
    """The load-balancing loss of a mixture of experts."""

    balance: Callable[..., torch.Tensor]
    """The family's own `load_balancing_loss_func`."""

    num_experts: int
    """Number of experts."""

    top_k: int
    """Experts per token."""

    coefficient: float
    """`router_aux_loss_coef`: factor on the loss."""

    def __call__(self, outputs: Any, counted: torch.Tensor | None = None) -> torch.Tensor:
        """Return the loss times the coefficient, a float32 scalar.

        Args:
            outputs: Output of the model or its decoder; `router_logits` has (B · S, experts) for each layer.
            counted: Mask of the tokens that count, (B, S); `None` counts all.
        """
        loss = self.balance(outputs.router_logits, self.num_experts, self.top_k, counted)
        return self.coefficient * loss


def find_router_loss(model: PreTrainedModel | PeftModel) -> RouterLoss | None:
    """Return the load-balancing loss that a model's configuration enables; `None` for none, or one of another form."""
    if has_virtual_tokens(model):
        return None  # they go through the routers, too
    base: Any = base_model(model)
    config = base.config.get_text_config()
    balance = balancing_loss_of(base)
    num_experts, top_k = (getattr(base, name, None) for name in ("num_experts", "num_experts_per_tok"))
    if not getattr(config, "output_router_logits", False) or None in (balance, num_experts, top_k):
        return None
    return RouterLoss(cast("Any", balance), cast("int", num_experts), cast("int", top_k), config.router_aux_loss_coef)


def tokens_of_documents(
    labels: torch.Tensor, document_lengths: DocumentLengths | Sequence[Sequence[DocumentLength]]
) -> torch.Tensor:
    """Return the mask of tokens that are not padding, (B, S); if all are padding, all are true.

    Args:
        labels: Labels, aligned with the tokens, (B, S); padding is the last document of a row and has none.
        document_lengths: Tokens of each document of each row.
    """
    counted = torch.ones_like(labels, dtype=torch.bool)
    for row, lengths in enumerate(document_lengths):
        last = slice(labels.shape[1] - num_tokens(lengths[-1]), None)
        counted[row, last] = (labels[row, last] != IGNORE_INDEX).any()
    return counted | ~counted.any()
