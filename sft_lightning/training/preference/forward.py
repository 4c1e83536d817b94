"""The log-probabilities that a model gives to the answers of a micro-batch of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sft_lightning.data.pairs.collate import PairBatch
from sft_lightning.models.head.whole import Head
from sft_lightning.training.forward import decoder_inputs, logits_at, router_loss
from sft_lightning.training.losses import find_targets, log_probs_of, projected_log_probs

if TYPE_CHECKING:
    from sft_lightning.training.module import CausalLMModule


class AnswerLogProbs(NamedTuple):
    """The log-probabilities of the answers of P pairs, and the routers' loss of the same forward pass."""

    log_probs: torch.Tensor
    """Of the chosen and the rejected answers, summed over their supervised tokens, in nats, (P, 2) float32."""

    router_loss: torch.Tensor | None
    """Loss of a mixture of experts' routers, a scalar, its coefficient included; `None` for other models."""


def answer_log_probs(module: CausalLMModule, batch: PairBatch) -> AnswerLogProbs:
    """Return the log-probabilities of a micro-batch's answers, (P, 2), under the model as it is now.

    Args:
        module: The model, in training or evaluation mode.
        batch: P pairs.
    """
    targets = find_targets(batch)
    inputs, head = decoder_inputs(batch), module.head
    if isinstance(head, Head):
        out = head.decoder(**inputs)
        hidden = out.last_hidden_state.flatten(0, 1)[targets.positions]
        tokens = projected_log_probs(hidden, head.project, targets.ids, module.base_model.config.vocab_size)
    else:
        logits, out = logits_at(module.language_model, inputs, batch["supervised"])
        tokens = log_probs_of(logits, targets.ids)
    # Sums of slices, not an `index_add`, which adds in another order on every run of a GPU.
    sums = [part.sum() for part in tokens.split(batch["answer_lengths"])]
    return AnswerLogProbs(
        # Without a pair the sum still carries a graph: every rank has a backward pass.
        torch.stack(sums).view(-1, 2) if sums else tokens.sum().expand(0, 2),
        router_loss(module.language_model, out, batch),
    )
