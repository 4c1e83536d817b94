"""Tokenizes many texts at once and finds where each token ends in its text.

Tokenizers report offsets, but reading them into Python takes half as long as tokenizing. A byte-level vocabulary
(GPT-2, Llama 3, Qwen, …) does not need them: every token stands for a fixed number of bytes, so running sums over a
table give the end of each token. For every text, the sum is compared with the length of the text; where they differ (a
special token that swallows spaces), the offsets are read.

Two more steps take a fifth of the time without changing an id: normalizing texts to NFC that are in NFC, and a word
cache that is full after a thousand rows. Byte-level tokenizers are used through a copy without the first and with a
larger cache.
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
"""Characters to put before a text that continues another, so that the tokenizer adds no prefix space to it."""


class TextEncoder:
    """Tokenizes texts, without adding special tokens.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Tokenize texts."""
        return self._by_offsets(texts) if self._bytes_of is None else self._by_lengths(list(texts), self._bytes_of)

    def encode_continuations(self, texts: Sequence[str]) -> Tokens:
        """Tokenize texts that continue others: without the space that some tokenizers put before a text.

        Raises:
            UserError: If the tokenizer cannot tokenize one of them as a continuation.
        """
        if self._bytes_of is not None:
            return self.encode(texts)  # a byte-level tokenizer without a prefix space adds nothing
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
                raise UserError(
                    f"model.tokenizer_name_or_path: the tokenizer cannot tokenize {text[:40]!r} after another text "
                    "without changing its tokens; use another tokenizer"
                )
        return concatenate([found[i] for i in range(len(texts))])

    @functools.cached_property
    def _bytes_of(self) -> npt.NDArray[np.int64] | None:
        return bytes_of_tokens(self._backend)

    def _by_lengths(self, texts: list[str], bytes_of: npt.NDArray[np.int64]) -> Tokens:
        """Tokenize, and find where tokens end from a table of their lengths."""
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
        read = split(self._by_offsets([texts[i] for i in wrong]))
        return replace_texts(tokens, dict(zip(wrong.tolist(), read, strict=True)))

    @functools.cached_property
    def _fast(self) -> Tokenizer:
        """The tokenizer for texts in NFC."""
        return without_normalizer(self._backend)

    def _by_offsets(self, texts: Sequence[str]) -> Tokens:
        self._disable_truncation_and_padding()
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return concatenate(
            [
                _from_offsets(text, encoding.ids, np.array(encoding.offsets, np.int64).reshape(-1, 2))
                for text, encoding in zip(texts, encodings, strict=True)
            ]
        )

    def _disable_truncation_and_padding(self) -> None:
        # transformers leaves the truncation and padding of the last call in the backend. Changed only where needed:
        # a tokenizer that another thread is using cannot be changed.
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()


def _in_nfc(text: str) -> bool:
    """Whether a text is in NFC.

    Python's Unicode tables are at least as new as the tokenizer's, and newer versions keep normalized text as it is.
    """
    return text.isascii() or unicodedata.is_normalized("NFC", text)


_WORDS_CACHED = 1 << 17
"""Words whose tokens are cached, about 20 MB; the default of 10,000 is used up after a thousand rows."""


def without_normalizer(backend: Tokenizer) -> Tokenizer:
    """Return a faster tokenizer that gives the same ids for texts that the normalizer would not change.

    The two share one model.
    """
    copy = Tokenizer(backend.model)
    copy.pre_tokenizer = backend.pre_tokenizer
    added = backend.get_added_tokens_decoder()
    copy.add_tokens([added[index] for index in sorted(added)])
    copy.encode_special_tokens = backend.encode_special_tokens
    if copy.get_added_tokens_decoder() != added:  # added tokens whose ids have gaps do not get the same ids again
        copy = Tokenizer.from_str(backend.to_str())
        copy.normalizer = None
        copy.no_truncation()
        copy.no_padding()
    remember_words(copy, _WORDS_CACHED)
    return copy


def _from_offsets(text: str, ids: list[int], offsets: Longs) -> Tokens:
    """Return the tokens of a text from their offsets in characters, (T, 2).

    Each token starts where the one before it ends. The starts of the offsets are only used where a token reaches into
    the next one, because byte-level tokenizers leave leading spaces out of them.
    """
    ends = _ends_without_overlaps(offsets)
    covers_none = (offsets[:, 0] >= np.minimum(offsets[:, 1], ends)) & (np.concatenate([[0], ends[:-1]]) == ends)
    if not text.isascii():
        ends = _bytes_before(text)[ends]
    return Tokens(np.array(ids, np.int32), np.array([len(ids)]), ends, np.where(covers_none, ends, ends - 1))


def _ends_without_overlaps(offsets: Longs) -> Longs:
    """Return where each token ends, in characters, (T,); does not decrease.

    The prefix token `▁` of a Metaspace tokenizer has the offsets of the first character, although this may be the
    beginning of the next token: (0, 1), (0, 2). It then ends where the next one starts; otherwise a border after that
    character would look as if no token crossed it. Several tokens of one character, (0, 1), (0, 1), all end behind it.
    """
    if not len(offsets):
        return offsets[:, 1]
    starts, ends = offsets[:, 0], np.maximum.accumulate(offsets[:, 1])
    overlaps = (starts[1:] < ends[:-1]) & (ends[1:] > ends[:-1])
    if not overlaps.any():
        return ends
    ends = np.append(np.where(overlaps, starts[1:], ends[:-1]), ends[-1])
    return np.minimum.accumulate(ends[::-1])[::-1]


def _bytes_before(text: str) -> Longs:
    """Return the UTF-8 bytes before each character and at the end, (characters + 1,)."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])


def _without(anchor: Tokens, joined: Tokens) -> Tokens | None:
    """Return the tokens after the anchor; `None` if the anchor is tokenized differently than alone."""
    if not len(anchor.ids):
        return None
    skip, end = len(anchor.ids), int(anchor.ends[-1])
    if len(joined.ids) < skip or not np.array_equal(joined.ids[:skip], anchor.ids) or joined.ends[skip - 1] != end:
        return None
    return Tokens(
        joined.ids[skip:], np.array([len(joined.ids) - skip]), joined.ends[skip:] - end, joined.last[skip:] - end
    )


def bytes_of_tokens(backend: Tokenizer) -> npt.NDArray[np.int64] | None:
    """Return how many bytes of text each token stands for, (vocabulary,); `None` without a byte-level vocabulary."""
    if not _is_byte_level(backend):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table = np.zeros(max(vocabulary.values(), default=0) + 1, np.int64)
    for token, index in vocabulary.items():
        table[index] = len(token)  # a byte-level vocabulary writes each byte as a character
    for index, added in backend.get_added_tokens_decoder().items():
        table[index] = byte_length(added.content)
    return table


def _is_byte_level(backend: Tokenizer) -> bool:
    """Whether every token stands for a fixed number of bytes, and the tokenizer puts nothing before a text."""
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
