"""The rows of the embeddings: one for every token of the tokenizer; new ones start at the mean of the old ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sft_lightning.errors import UserError


def num_embeddings(model: PreTrainedModel) -> int:
    """Return the number of rows of the input embedding."""
    return len(next(model.get_input_embeddings().parameters()))


def resize_embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    added: Sequence[str],
    *,
    pad_to_multiple_of: int | None = None,
    any_size: bool = False,
) -> list[int]:
    """Give every token of the tokenizer a row in the embeddings; rows are never removed.

    Args:
        model: Changed in place.
        tokenizer: The tokenizer, added tokens included.
        added: The tokens that the user added to the tokenizer.
        pad_to_multiple_of: Round the number of rows up to a multiple of this, which some hardware computes faster.
        any_size: Accept a tokenizer with more tokens than rows even if none were added to it.

    Returns:
        Sorted ids of the tokens that the model may not know: those added, and those that had no row before.

    Raises:
        UserError: If the tokenizer has more tokens than rows, and neither `added` nor `any_size` allows it.
    """
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise UserError(f"model.pad_to_multiple_of: must be at least 1 (got {pad_to_multiple_of})")
    rows, num_tokens = num_embeddings(model), len(tokenizer)
    if num_tokens > rows + len(added) and not any_size:
        raise UserError(
            f"model.tokenizer_name_or_path: the tokenizer has {num_tokens} tokens, but the model embeds only {rows}; "
            "use the model's own tokenizer, or set model.resize_vocabulary: true to train new rows for it"
        )
    wanted = max(rows, num_tokens)
    grow_embeddings(model, math.ceil(wanted / (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1))
    return sorted({*_ids(tokenizer, added), *range(rows, num_tokens)})


def _ids(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


@torch.no_grad()
def grow_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Grow the input and the output embedding; tied ones stay tied.

    New rows are the mean of the old ones (Hewitt, 2021, "Initializing New Word Embeddings for Pretrained Language
    Models").

    Args:
        model: Changed in place.
        rows: Number of rows afterwards.
    """
    old = num_embeddings(model)
    if rows == old:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in module.parameters() if module is not None else ():
            parameter[old:] = _mean_row(parameter[:old])


def grow_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Return an embedding matrix, or a head's bias, with new rows at the mean of the old ones, as `grow_embeddings`.

    Args:
        tensor: (old rows, …).
        rows: Number of rows to return; a tensor that has as many or more is returned as it is.
    """
    missing = rows - len(tensor)
    return tensor if missing <= 0 else torch.cat([tensor, _mean_row(tensor).expand(missing, *tensor.shape[1:])])


def _mean_row(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().mean(0).to(tensor.dtype)


def embedding_names(model: PreTrainedModel) -> list[str]:
    """Return the last parts of the names of the input embedding and, unless they are tied, of the head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [embedding] if head is None or tied_embedding_names(model) else [embedding, head]
    names = {module: name for name, module in model.named_modules()}
    return [names[module].rsplit(".", 1)[-1] for module in modules]


def tied_embedding_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the input embedding and of the head if they share one matrix, else nothing."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return []
    return [name for name, module in model.named_modules() if module is embedding or module is head]


def check_new_tokens_train(model: PreTrainedModel, ids: Sequence[int], names: Sequence[str]) -> None:
    """Check that tokens which are new to the model can be learned.

    Args:
        model: The transformers model, with or without an adapter inside.
        ids: Ids of the new tokens, from `resize_embeddings`.
        names: Names of the embeddings, from `embedding_names`.

    Raises:
        UserError: If the input embedding is frozen.
    """
    if ids and not any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters()):
        raise UserError(
            f"model.add_tokens: {len(ids)} new tokens (ids {ids[0]}..{ids[-1]}) would stay at their initial value, "
            f"because the embeddings are frozen; set model.adapter.modules_to_save: [{', '.join(names)}], or "
            "model.adapter.trainable_token_indices: added (for full fine-tuning: model.trainable)"
        )
