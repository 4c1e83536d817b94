"""A tokenizer as a function on many texts, saying where each token ends.

Tokenizers report offsets, but reading them into Python costs as much again as half the tokenizing. A byte-level
vocabulary (GPT-2, Llama 3, Qwen, …) does not need them: every token stands for a fixed number of bytes, so running sums
of a table say where tokens end. Whether the sums come out at the length of the text is checked for every text; one for
which they do not (a special token that swallows spaces) is asked for its offsets.

Two more things cost time without changing an id, a fifth of it together: bringing texts to NFC that are in NFC, and a
cache of words that is soon full. Such vocabularies are used through a copy that does neither.
"""

from __future__ import annotations

import functools
import itertools
import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sft_lightning.compat.data_libraries import remember_words
from sft_lightning.data.tokens.tokenization import Tokens, byte_length, concatenate, replace_texts, split
from sft_lightning.errors import UserError
from sft_lightning.types import Longs

_ANCHORS = ("\n", "a", ".", "0")
"""Characters to stand before a text that continues another, so that the tokenizer adds no prefix space to it."""


class TextEncoder:
    """A fast tokenizer's `encode` on texts.

    Args:
        tokenizer: The tokenizer; no special tokens are added.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Tokenize texts."""
        return self._by_offsets(texts) if self._bytes_of is None else self._by_lengths(list(texts), self._bytes_of)

    def encode_continuations(self, texts: Sequence[str]) -> Tokens:
        """Tokenize texts that continue others.

        Raises:
            UserError: If there is no way to keep the tokenizer from treating one as the beginning of a text.
        """
        if self._bytes_of is not None:
            return self.encode(texts)  # a byte-level tokenizer without a prefix space adds nothing to a text
        found: dict[int, Tokens] = {}
        for anchor in _ANCHORS:
            missing = [i for i in range(len(texts)) if i not in found]
            if not missing:
                break
            alone = self.encode([anchor])
            for i, joined in zip(missing, split(self.encode([anchor + texts[i] for i in missing])), strict=True):
                rest = _without(alone, joined)
                if rest is not None:
                    found[i] = rest
        for i, text in enumerate(texts):
            if i not in found:
                raise UserError(f"the tokenizer cannot tokenize {text[:40]!r} as the continuation of another text")
        return concatenate([found[i] for i in range(len(texts))])

    @functools.cached_property
    def _bytes_of(self) -> npt.NDArray[np.int64] | None:
        return bytes_of_tokens(self._backend)

    def _by_lengths(self, texts: list[str], bytes_of: npt.NDArray[np.int64]) -> Tokens:
        """Let a table of token lengths say where tokens end."""
        encodings = self._fast.encode_batch_fast(texts, add_special_tokens=False)
        counts = np.fromiter(map(len, encodings), np.int64, len(encodings))
        ids = np.fromiter(
            itertools.chain.from_iterable(encoding.ids for encoding in encodings), np.int32, int(counts.sum())
        )
        running = np.concatenate([[0], np.cumsum(bytes_of[ids])])
        bounds = np.concatenate([[0], np.cumsum(counts)])
        starts = running[bounds[:-1]]
        lengths = running[bounds[1:]] - starts
        ends = running[1:] - np.repeat(starts, counts)
        tokens = Tokens(ids, counts, ends, ends - 1)
        expected = np.fromiter(map(byte_length, texts), np.int64, len(texts))
        wrong = np.flatnonzero((lengths != expected) | ~np.fromiter(map(_in_nfc, texts), bool, len(texts)))
        if not len(wrong):
            return tokens
        asked = split(self._by_offsets([texts[i] for i in wrong]))
        return replace_texts(tokens, dict(zip(wrong.tolist(), asked, strict=True)))

    @functools.cached_property
    def _fast(self) -> Tokenizer:
        """The tokenizer for texts in NFC."""
        return without_normalizer(self._backend)

    def _by_offsets(self, texts: Sequence[str]) -> Tokens:
        self._whole()
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return concatenate(
            [
                _from_offsets(text, encoding.ids, np.array(encoding.offsets, np.int64).reshape(-1, 2))
                for text, encoding in zip(texts, encodings, strict=True)
            ]
        )

    def _whole(self) -> None:
        # transformers leaves in the backend whatever truncation and padding its last caller asked for. Asked first,
        # because a tokenizer that another thread tokenizes with cannot be changed.
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()


def _in_nfc(text: str) -> bool:
    """Whether bringing a text to NFC leaves it as it is.

    Python's tables of Unicode are at least as new as the tokenizer's, and no new version undoes what was normalized.
    """
    return text.isascii() or unicodedata.is_normalized("NFC", text)


_WORDS_CACHED = 1 << 17
"""Words whose tokens are remembered, about 20 MB; the 10,000 of the default are spent after a thousand rows."""


def without_normalizer(backend: Tokenizer) -> Tokenizer:
    """Return a tokenizer that does the same to texts that its normalizer would not change, in less time.

    The model is shared, not copied.
    """
    copy = Tokenizer(backend.model)
    copy.pre_tokenizer = backend.pre_tokenizer
    added = backend.get_added_tokens_decoder()
    copy.add_tokens([added[index] for index in sorted(added)])
    copy.encode_special_tokens = backend.encode_special_tokens
    if copy.get_added_tokens_decoder() != added:  # ids with gaps between them cannot be given again
        copy = Tokenizer.from_str(backend.to_str())
        copy.normalizer = None
        copy.no_truncation()
        copy.no_padding()
    remember_words(copy, _WORDS_CACHED)
    return copy


def _from_offsets(text: str, ids: list[int], offsets: Longs) -> Tokens:
    """Turn offsets in characters into ends in bytes.

    The tokens tile the text, so a token starts where the one before it ends. The offsets' own starts would not do:
    byte-level tokenizers leave leading spaces out of them.
    """
    ends = np.maximum.accumulate(offsets[:, 1]) if len(ids) else offsets[:, 1]
    covers_none = (offsets[:, 0] >= offsets[:, 1]) & (np.concatenate([[0], ends[:-1]]) == ends)
    if not text.isascii():
        ends = _bytes_before(text)[ends]
    return Tokens(np.array(ids, np.int32), np.array([len(ids)]), ends, np.where(covers_none, ends, ends - 1))


def _bytes_before(text: str) -> Longs:
    """Return the UTF-8 bytes before each character and at the end, (characters + 1,)."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])


def _without(anchor: Tokens, joined: Tokens) -> Tokens | None:
    """Return the tokens after the anchor's, if the anchor's come out as they do alone."""
    if not len(anchor.ids):
        return None
    skip, end = len(anchor.ids), int(anchor.ends[-1])
    if len(joined.ids) < skip or not np.array_equal(joined.ids[:skip], anchor.ids) or joined.ends[skip - 1] != end:
        return None
    return Tokens(
        joined.ids[skip:], np.array([len(joined.ids) - skip]), joined.ends[skip:] - end, joined.last[skip:] - end
    )


def bytes_of_tokens(backend: Tokenizer) -> npt.NDArray[np.int64] | None:
    """Return how many bytes of text each token stands for, (vocabulary,); `None` if the vocabulary does not say."""
    if not _is_byte_level(backend):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table = np.zeros(max(vocabulary.values(), default=0) + 1, np.int64)
    for token, index in vocabulary.items():
        table[index] = len(token)  # a byte-level vocabulary writes each byte as one character
    for index, added in backend.get_added_tokens_decoder().items():
        table[index] = byte_length(added.content)
    return table


def _is_byte_level(backend: Tokenizer) -> bool:
    """Whether every token of the model stands for bytes of the text, and nothing is put before a text."""
    normalizer, splitter = _settings(backend.normalizer), _settings(backend.pre_tokenizer)
    if normalizer is not None and normalizer.get("type") != "NFC":
        return False
    steps = (splitter or {}).get("pretokenizers", [splitter or {}])
    return any(step.get("type") == "ByteLevel" and not step.get("add_prefix_space") for step in steps) and all(
        step.get("type") in ("ByteLevel", "Split", "Digits") and step.get("behavior", "Isolated") != "Removed"
        for step in steps
    )


def _settings(part: Any) -> dict[str, Any] | None:
    state = part.__getstate__() if part is not None else None
    return json.loads(state) if isinstance(state, bytes) else None
