"""New tokens in the embeddings: their rows start at the mean of the old ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sft_lightning.errors import UserError


def num_rows(model: PreTrainedModel) -> int:
    """Return how many tokens the model embeds."""
    return len(next(model.get_input_embeddings().parameters()))


def resize_embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    added: Sequence[str],
    *,
    pad_to_multiple_of: int | None = None,
    any_size: bool = False,
) -> list[int]:
    """Give every token of the tokenizer a row, if it has none; never take rows away.

    New rows, of the input and of the output embedding, are the mean of the old ones (Hewitt, 2021, "Initializing New
    Word Embeddings for Pretrained Language Models"); tied embeddings stay tied.

    Args:
        model: Changed in place.
        tokenizer: With the added tokens.
        added: Tokens that the user added.
        pad_to_multiple_of: Round the number of rows up to a multiple, for the hardware.
        any_size: Take a tokenizer with more tokens than rows although none were added to it.

    Returns:
        Ids of the tokens that the model may not know: the added ones, and those without a row until now.

    Raises:
        UserError: If the tokenizer has more tokens than rows, and neither `added` nor `any_size` explains it.
    """
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise UserError(f"model.pad_to_multiple_of: must be at least 1 (got {pad_to_multiple_of})")
    rows, num_tokens = num_rows(model), len(tokenizer)
    if num_tokens > rows + len(added) and not any_size:
        raise UserError(
            f"model.tokenizer_name_or_path: the tokenizer has {num_tokens} tokens, but the model embeds only {rows}; "
            "use the model's own tokenizer, or set model.resize_vocabulary: true to train new rows for it"
        )
    wanted = max(rows, num_tokens)
    wanted = math.ceil(wanted / (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
    if wanted != rows:
        model.resize_token_embeddings(wanted, mean_resizing=False)
        _fill_new_rows(model, rows)
    return sorted({*_ids(tokenizer, added), *range(rows, num_tokens)})


def _ids(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


@torch.no_grad()
def _fill_new_rows(model: PreTrainedModel, rows: int) -> None:
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in [] if module is None else [module.weight, getattr(module, "bias", None)]:
            if isinstance(parameter, torch.Tensor) and len(parameter) > rows:
                parameter[rows:] = parameter[:rows].float().mean(0).to(parameter.dtype)


def embedding_names(model: PreTrainedModel) -> list[str]:
    """Return the last parts of the names of the input embedding and, where it is not tied to it, of the head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [embedding] if head is None or tied_names(model) else [embedding, head]
    names = {module: name for name, module in model.named_modules()}
    return [names[module].rsplit(".", 1)[-1] for module in modules]


def tied_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the input embedding and of the head if they are one matrix, else nothing."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return []
    return [name for name, module in model.named_modules() if module is embedding or module is head]


def check_new_tokens_train(model: PreTrainedModel, ids: Sequence[int], names: Sequence[str]) -> None:
    """Check that tokens which the model does not know can be learned.

    Args:
        model: The transformers model, an adapter around its modules or not.
        ids: The tokens, from `resize_embeddings`.
        names: What the embeddings are called, from `embedding_names`.

    Raises:
        UserError: If the input embedding is frozen.
    """
    if ids and not any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters()):
        raise UserError(
            f"model.add_tokens: {len(ids)} new tokens (ids {ids[0]}..{ids[-1]}) would stay at their initial value, "
            f"because the embeddings are frozen; set model.adapter.modules_to_save: [{', '.join(names)}], or "
            "model.adapter.trainable_token_indices: added (for full fine-tuning of some: model.trainable)"
        )
