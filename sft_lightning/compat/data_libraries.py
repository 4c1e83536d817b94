"""Undocumented parts of datasets and tokenizers that we use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sft_lightning.compat.names import uses

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer


@uses(
    "datasets:Dataset",
    attributes=("_fingerprint",),
    feature="data.sources with a Hub data set",
    since="4.0",
    replacement="a hash of every row, which reads the whole data set at each start",
)
def content_fingerprint(dataset: Dataset) -> str:
    """Return the fingerprint of a data set: a hash of its content and of the operations on it, for the store's key."""
    return str(dataset._fingerprint)


@uses(
    "tokenizers:Tokenizer",
    feature="tokenizing at full speed",
    since="0.23",
    replacement="the default cache of 10,000 words, which is a fifth slower on large files",
)
def remember_words(tokenizer: Tokenizer, number: int) -> bool:
    """Enlarge the cache of words in a tokenizer's model; the ids do not change.

    Args:
        tokenizer: Changed in place.
        number: Words in the cache, about 150 bytes each.

    Returns:
        Whether the model has such a cache; a model of whole words has none.
    """
    resize: Any = getattr(tokenizer.model, "_resize_cache", None)
    if resize is None:
        return False
    resize(number)
    return True
