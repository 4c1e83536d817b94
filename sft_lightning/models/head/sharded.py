"""The head of a model whose weights are sharded: whole only while it runs, within the model's own forward pass.

What is to be made of the hidden states instead of logits is therefore computed in the head's place, and comes out of
the model as its logits would: whoever gathers weights and reduces gradients around the head sees a pass as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from sft_lightning.compat.peft import module_saved_in_full
from sft_lightning.compat.torch import forward_replaced_by
from sft_lightning.models.inspection import base_model, evaluating

_MARK = (1 / 3, -1e4 / 7)
"""Numbers that no rounding, scaling or squashing leaves alone."""


@dataclass(frozen=True)
class ShardedHead:
    """A plain linear head, whose product the model returns as it is."""

    module: nn.Linear
    """The output embedding, (…, D) → (…, V)."""

    @contextmanager
    def replaced_by(self, compute: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Let `compute` run in the head's place: hidden states (B, C, D) → what the model returns as its logits."""
        with forward_replaced_by(self.module, compute):
            yield


def find_sharded_head(model: PreTrainedModel | PeftModel, vocab_size: int, device: torch.device) -> ShardedHead | None:
    """Return the head of a model, if the model returns what comes out of it unchanged; all processes call this.

    Args:
        model: The model, adapters included.
        vocab_size: Ids to draw a probe from.
        device: Where the model computes.
    """
    output = base_model(model).get_output_embeddings()
    module = module_saved_in_full(output) or output
    prompts = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    if type(module) is not nn.Linear or prompts:
        return None
    head = ShardedHead(module)
    return head if _comes_out_unchanged(base_model(model), head, vocab_size, device) else None


@torch.no_grad()
def _comes_out_unchanged(model: PreTrainedModel, head: ShardedHead, vocab_size: int, device: torch.device) -> bool:
    """Whether the model returns the head's product as its logits, and anything else in its place too."""
    ids = torch.randint(vocab_size, (1, 8), generator=torch.Generator().manual_seed(0)).to(device)
    inputs: dict[str, Any] = {
        "input_ids": ids, "position_ids": torch.arange(8, device=device)[None], "document_lengths": [[8]],
        "use_cache": False, "logits_to_keep": torch.arange(8, device=device),
    }  # fmt: skip
    made: list[torch.Tensor] = []
    mark = torch.tensor(_MARK, device=device).view(1, 1, -1)

    def watch(hidden: torch.Tensor) -> torch.Tensor:
        made.append(nn.functional.linear(hidden, head.module.weight, head.module.bias))
        return mark

    with evaluating(model):
        own = model(**inputs).logits
        with head.replaced_by(watch):
            marked = model(**inputs).logits
    return len(made) == 1 and torch.equal(marked, mark) and torch.equal(made[0].to(own.dtype), own)
