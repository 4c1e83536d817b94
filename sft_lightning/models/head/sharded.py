"""The output head of a sharded model, whose weights are complete only while it runs in the model's forward pass.

A loss that is computed from hidden states therefore runs in place of the head, and the model returns its result as if
it were logits. The hooks that gather weights and reduce gradients around the head work as in any forward pass.
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
from sft_lightning.models.inspection import base_model, evaluating, has_virtual_tokens

_MARK = (1 / 3, -1e4 / 7)
"""Values that any rounding, scaling or squashing would change."""


@dataclass(frozen=True)
class ShardedHead:
    """A plain linear head whose output the model returns unchanged as its logits."""

    module: nn.Linear
    """The output embedding, (…, D) → (…, V)."""

    @contextmanager
    def replaced_by(self, compute: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Run `compute` in place of the head: hidden states (B, C, D) → what the model returns as its logits."""
        with forward_replaced_by(self.module, compute):
            yield


def find_sharded_head(model: PreTrainedModel | PeftModel, vocab_size: int, device: torch.device) -> ShardedHead | None:
    """Return the head of a sharded model, if the model returns the head's output unchanged.

    All processes must call this together.

    Args:
        model: The model, adapters included.
        vocab_size: Random token ids of the probe are below it.
        device: The device that the model computes on.

    Returns:
        The head; `None` if it is not a plain linear layer, or if the model changes its output.
    """
    output = base_model(model).get_output_embeddings()
    module = module_saved_in_full(output) or output
    if type(module) is not nn.Linear or has_virtual_tokens(model):
        return None
    head = ShardedHead(module)
    return head if _comes_out_unchanged(base_model(model), head, vocab_size, device) else None


@torch.no_grad()
def _comes_out_unchanged(model: PreTrainedModel, head: ShardedHead, vocab_size: int, device: torch.device) -> bool:
    """Whether the model returns the head's output as its logits, and also whatever replaces that output."""
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
