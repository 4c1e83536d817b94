"""The forward pass of a micro-batch: logits and losses, at supervised tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sft_lightning.batch import Batch, SupervisedPositions, batch_to
from sft_lightning.data.batches.collate import collate
from sft_lightning.models.attention.isolation import MakeInputs
from sft_lightning.models.head.routers import find_router_loss, tokens_of_documents
from sft_lightning.models.head.sharded import ShardedHead, find_sharded_head
from sft_lightning.models.head.whole import Head, find_head
from sft_lightning.models.inspection import base_model, is_sharded
from sft_lightning.training.losses import (
    LossSums,
    Targets,
    cross_entropy_sums,
    find_targets,
    linear_cross_entropy,
    projected_cross_entropy,
)
from sft_lightning.types import TokenizedExample


def find_any_head(
    model: PreTrainedModel | PeftModel, vocab_size: int, device: torch.device
) -> Head | ShardedHead | None:
    """Return the head of a model, sharded or not; `None` if only the model itself can make its logits.

    Args:
        model: The model, adapters included.
        vocab_size: Number of token ids to probe it with.
        device: Where the model computes.
    """
    find = find_sharded_head if is_sharded(model) else find_head
    return find(model, vocab_size, device)


def decoder_inputs(batch: Batch) -> dict[str, Any]:
    """Return the arguments that the decoder is called with.

    The documents are there under transformers' own names too: attention implementations other than ours would find
    them by the positions, and only in a batch of one row.
    """
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "document_lengths": batch["document_lengths"],
        **batch["document_lengths"].flash_arguments,
        "use_cache": False,
    }


def inputs_of_rows(device: torch.device) -> MakeInputs:
    """Return what makes rows of documents into the arguments of a forward pass, as training does.

    Args:
        device: Where the model computes.
    """

    def inputs_of(rows: Sequence[Sequence[torch.Tensor]]) -> dict[str, Any]:
        documents = [[_unsupervised(ids) for ids in row] for row in rows]
        return decoder_inputs(batch_to(collate(documents, pad_token_id=0, denominator=1.0), device))

    return inputs_of


def _unsupervised(ids: torch.Tensor) -> TokenizedExample:
    return TokenizedExample(ids.numpy().astype(np.int32), np.zeros(len(ids), np.float32))


def token_loss_sums(model: PreTrainedModel | PeftModel, head: Head | ShardedHead | None, batch: Batch) -> LossSums:
    """Return the loss sums of a micro-batch.

    Args:
        model: The model, adapters included.
        head: The model's head, a sharded one if its weights are sharded; `None` to use the model's own logits.
        batch: Packed rows.
    """
    targets = find_targets(batch)
    inputs = decoder_inputs(batch)
    if head is None:
        logits, out = logits_at(model, inputs, batch["supervised"])
        sums = cross_entropy_sums(logits, targets)
    elif isinstance(head, ShardedHead):
        sums, out = _sums_within(model, head, inputs, targets, batch["supervised"])
    else:
        out = head.decoder(**inputs)
        sums = _sums_under(head, out.last_hidden_state.flatten(0, 1)[targets.positions], targets, base_model(model))
    routers = router_loss(model, out, batch) if model.training else None
    # Each token of the step carries its part of the routers' loss.
    return sums if routers is None else sums._replace(loss=sums.loss + routers * sums.weight)


def _sums_under(head: Head, hidden: torch.Tensor, targets: Targets, base: PreTrainedModel) -> LossSums:
    """Return the loss sums of hidden states at the targets' positions, (N, D)."""
    if head.linear is None:
        return projected_cross_entropy(hidden, head.project, targets, base.config.vocab_size)
    return linear_cross_entropy(
        hidden, head.linear.weight, head.linear.bias, targets, scale=head.scale, softcap=head.softcap
    )


def _sums_within(
    model: PreTrainedModel | PeftModel,
    head: ShardedHead,
    inputs: dict[str, Any],
    targets: Targets,
    supervised: SupervisedPositions,
) -> tuple[LossSums, Any]:
    """Return the loss sums, computed in the place of the head, and the model's whole output."""

    def sums(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden[supervised.rows, supervised.column_index]
        found = linear_cross_entropy(hidden, head.module.weight, head.module.bias, targets)
        return torch.stack([found.loss, found.correct]).view(1, 1, 2).clone()  # FSDP2 wants no views

    with head.replaced_by(sums):
        out = model(**inputs, logits_to_keep=supervised.columns)
    loss, correct = out.logits.flatten()
    return LossSums(loss, targets.weights.sum(), correct), out


def router_loss(model: PreTrainedModel | PeftModel, outputs: Any, batch: Batch) -> torch.Tensor | None:
    """Return the loss of a mixture of experts' routers, a scalar, its coefficient included; `None` for other models.

    Args:
        model: The model, adapters included.
        outputs: What the model or its decoder returned for the micro-batch.
        batch: The micro-batch.
    """
    routers = find_router_loss(model)
    if routers is not None:
        return routers(outputs, tokens_of_documents(batch["labels"], batch["document_lengths"]))
    own: torch.Tensor | None = getattr(outputs, "aux_loss", None)
    return None if own is None else base_model(model).config.get_text_config().router_aux_loss_coef * own


def logits_at(
    model: PreTrainedModel | PeftModel, inputs: dict[str, Any], supervised: SupervisedPositions
) -> tuple[torch.Tensor, Any]:
    """Return the model's own logits at some positions; it computes those of all columns that contain a position.

    Args:
        model: The model, adapters included.
        inputs: As `decoder_inputs` makes them.
        supervised: N positions.

    Returns:
        The logits, (N, V), and the model's whole output.
    """
    out = model(**inputs, logits_to_keep=supervised.columns)
    return out.logits[supervised.rows, supervised.column_index], out
