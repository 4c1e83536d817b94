"""A batch of texts that are continued token by token, for contrastive search and diverse beam search.

transformers 5 moved both searches to code on its Hub. They need only a model's forward pass, and a cache whose rows can
be repeated and reordered.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sft_lightning.errors import UserError


class TextContinuation:
    """Texts, the model's cache of them, and the logits of their next token.

    Args:
        model: The model, in evaluation mode.
        input_ids: Left-padded texts, (N, S).
        attention_mask: 1 at tokens, 0 at padding, (N, S).
        hidden: Keep the hidden states of the last layer.

    Raises:
        UserError: If the model has no cache whose rows can be reordered, such as Mamba.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        hidden: bool = False,
    ) -> None:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self._accepted = set(inspect.signature(base.forward).parameters)
        self._name = type(base).__name__
        self._model = base  # with its adapters; `lockstep` counts its passes
        self._hidden = hidden
        self.mask = attention_mask
        self._cache: Any = None
        self.logits: torch.Tensor
        """Logits of the next token, (N, vocabulary)."""
        self.hidden: torch.Tensor
        """Hidden states of the last layer for the tokens fed last, (N, T, hidden)."""
        self._step(input_ids)

    def feed(self, tokens: torch.Tensor) -> None:
        """Append a token to each text.

        Args:
            tokens: Token ids, (N,).
        """
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self._step(tokens[:, None])

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be repeated.

        Args:
            rows: Row numbers, (M,).
        """
        self._cache.reorder_cache(rows)
        self.mask, self.logits = self.mask[rows], self.logits[rows]

    def _step(self, input_ids: torch.Tensor) -> None:
        options: dict[str, Any] = {"output_hidden_states": True} if self._hidden else {}
        if "position_ids" in self._accepted:
            options["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        if "logits_to_keep" in self._accepted:
            options["logits_to_keep"] = 1
        out = self._model(
            input_ids=input_ids, attention_mask=self.mask, past_key_values=self._cache, use_cache=True, **options
        )
        self._cache = getattr(out, "past_key_values", None)
        if not hasattr(self._cache, "reorder_cache"):
            raise UserError(
                "generation: contrastive and diverse beam search require a key-value cache whose rows can be "
                f"reordered, which {self._name} does not have; use another mode"
            )
        self.logits = out.logits[:, -1].float()
        if self._hidden:
            self.hidden = out.hidden_states[-1].float()
