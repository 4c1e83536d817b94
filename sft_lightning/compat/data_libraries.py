"""What is used of datasets and tokenizers beyond their documented interfaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sft_lightning.compat.names import uses

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer


@uses(
    "datasets:Dataset",
    attributes=("_fingerprint",),
    feature="data.sources: a data set of the Hub",
    since="4.0",
    replacement="a hash of every row, which reads the whole data set at each start",
)
def content_fingerprint(dataset: Dataset) -> str:
    """Return a data set's hash of its content and of what was done to it; the key of its token store has it."""
    return str(dataset._fingerprint)


@uses(
    "tokenizers:Tokenizer",
    feature="tokenizing at full speed",
    since="0.23",
    replacement="the default of 10,000 words, which is a fifth slower on large files",
)
def remember_words(tokenizer: Tokenizer, number: int) -> bool:
    """Let a tokenizer's model remember the tokens of more words; its ids do not change.

    Args:
        tokenizer: Changed in place.
        number: Words to remember, about 150 bytes each.

    Returns:
        Whether the model has such a memory; a model of whole words has none.
    """
    resize: Any = getattr(tokenizer.model, "_resize_cache", None)
    if resize is None:
        return False
    resize(number)
    return True
