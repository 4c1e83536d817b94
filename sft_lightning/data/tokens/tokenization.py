"""Segments → tokens with loss weights; the loss masks are exact by construction.

The segments of an example are joined and the whole text is tokenized once, so the ids are those of serving the same
text. The end of each token in the text gives its segment, so nothing is searched for. At serving the prompt is
tokenized without its answer, so no token may cross the border between the two: where the tokenizer would merge across
it, the text is cut there.

All arrays hold many examples: a Python loop over tokens would take longer than tokenizing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from sft_lightning.types import Longs, Segment, TokenizedExample


class Tokens(NamedTuple):
    """The tokens of several texts, one text after the other."""

    ids: npt.NDArray[np.int32]
    """Token ids of all texts, (T,)."""

    counts: Longs
    """Tokens of each text, (N,)."""

    ends: Longs
    """The end of each token in its text, in UTF-8 bytes, (T,); does not decrease within a text."""

    last: Longs
    """The last byte of each token, (T,); for a token without bytes, the byte after it."""


class Encoder(Protocol):
    """Tokenizes texts without adding special tokens; those written in a text are recognised."""

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Tokenize texts."""

    def encode_continuations(self, texts: Sequence[str]) -> Tokens:
        """Tokenize texts that continue others: without the space that some tokenizers put before a text."""


@dataclass(frozen=True)
class TokenizedBatch:
    """Tokenized examples, one after the other; iterating yields each of them."""

    input_ids: npt.NDArray[np.int32]
    """Token ids, (T,)."""

    loss_weights: npt.NDArray[np.float32]
    """Loss weight of each token, (T,)."""

    counts: Longs
    """Tokens of each example, (N,)."""

    def __len__(self) -> int:
        return len(self.counts)

    def __iter__(self) -> Iterator[TokenizedExample]:
        ends = np.cumsum(self.counts)
        for start, end in zip((ends - self.counts).tolist(), ends.tolist(), strict=True):
            yield TokenizedExample(self.input_ids[start:end], self.loss_weights[start:end])


def tokenize(examples: Sequence[Sequence[Segment]], encoder: Encoder) -> TokenizedBatch:
    """Tokenize examples.

    Args:
        examples: The segments of each example.
        encoder: The tokenizer.

    Raises:
        UserError: If a text cannot be cut before an answer.
    """
    return weigh(examples, encoder.encode(join(examples)), encoder)


def join(examples: Sequence[Sequence[Segment]]) -> list[str]:
    """Return the text of each example."""
    return ["".join([segment.text for segment in segments]) for segments in examples]


def weigh(examples: Sequence[Sequence[Segment]], tokens: Tokens, encoder: Encoder) -> TokenizedBatch:
    """Give each token of tokenized examples the weight of its segment.

    Args:
        examples: The segments of each example.
        tokens: The tokens of the joined texts.
        encoder: The tokenizer; tokenizes again the examples that must be cut.

    Raises:
        UserError: If a text cannot be cut before an answer.
    """
    pieces = _Pieces(examples)
    tokens = _cut(examples, tokens, pieces, encoder)
    tokens_before = np.searchsorted(tokens.last + np.repeat(pieces.text_starts, tokens.counts), pieces.ends)
    tokens_before[pieces.last_of_text] = np.cumsum(tokens.counts)  # with tokens at the end that have no bytes
    weights = np.repeat(pieces.weights, np.diff(tokens_before, prepend=0))
    return TokenizedBatch(tokens.ids, weights, tokens.counts)


class _Pieces:
    """The segments of many examples as flat arrays; positions are bytes in the concatenation of all texts."""

    def __init__(self, examples: Sequence[Sequence[Segment]]) -> None:
        self.segments = flat = [segment for segments in examples for segment in segments]
        self.counts = np.array([len(segments) for segments in examples], np.int64)
        self.weights = np.array([weight if supervised else 0.0 for _, supervised, weight in flat], np.float32)
        self.ends = np.cumsum([byte_length(text) for text, _, _ in flat], dtype=np.int64)
        """End of each segment, (segments,)."""
        self.last_of_text = np.cumsum(self.counts) - 1
        """Index of the last segment of each text, (N,)."""
        starts = np.concatenate([[0], self.ends[self.last_of_text[:-1]]])[: len(self.counts)]
        self.text_starts = starts.astype(np.int64)
        """Start of each text, (N,)."""
        self.text_of_segment = np.repeat(np.arange(len(self.counts)), self.counts)

    def borders(self) -> tuple[Longs, Longs]:
        """Return the segments after which the weight changes within a text, and their texts, both (borders,)."""
        same_text = self.text_of_segment[1:] == self.text_of_segment[:-1]
        changes = np.flatnonzero(same_text & (self.weights[1:] != self.weights[:-1]))
        texts = self.text_of_segment[changes]
        inside = self.ends[changes] > self.text_starts[texts]  # no token can cross a border at 0
        return changes[inside], texts[inside]


def _cut(examples: Sequence[Sequence[Segment]], tokens: Tokens, pieces: _Pieces, encoder: Encoder) -> Tokens:
    """Tokenize again, in pieces, the texts in which a token crosses a border."""
    changes, texts = pieces.borders()
    if not len(changes):
        return tokens
    positions = pieces.ends[changes]
    ends = tokens.ends + np.repeat(pieces.text_starts, tokens.counts)
    found = np.searchsorted(ends, positions)
    crossed = ends[np.minimum(found, len(ends) - 1)] != positions if len(ends) else np.ones(len(positions), bool)
    crossed |= _split_elsewhere(pieces.segments, changes, encoder)
    if not crossed.any():
        return tokens
    local = positions - pieces.text_starts[texts]
    cuts = {int(text): set[int]() for text in texts[crossed]}
    for text, position in zip(texts[crossed].tolist(), local[crossed].tolist(), strict=True):
        cuts[text].add(position)
    whole = {text: "".join([segment.text for segment in examples[text]]).encode() for text in cuts}
    borders = {text: set(local[texts == text].tolist()) for text in cuts}
    mended: dict[int, Tokens] = {}
    waiting = sorted(cuts)
    while waiting:
        # A cut can move tokens so that one of them crosses another border; each round cuts at least one more border.
        pieces_of = _encode_cut([whole[t] for t in waiting], [sorted(cuts[t]) for t in waiting], encoder)
        mended |= dict(zip(waiting, pieces_of, strict=True))
        still = {t: borders[t] - cuts[t] - set(mended[t].ends.tolist()) for t in waiting}
        waiting = [t for t in waiting if still[t]]
        for text in waiting:
            cuts[text] |= still[text]
    return replace_texts(tokens, mended)


def _split_elsewhere(segments: Sequence[Segment], changes: Longs, encoder: Encoder) -> npt.NDArray[np.bool_]:
    """Return whether the white space before a border is split differently when the text ends there, (borders,).

    GPT-2's splitter makes one token of "\\n\\n" at the end of a text, but two before a "0". No token crosses the
    border, and yet the prompt of training is not that of serving. So the text around a border is tokenized both ways.
    """
    sides = []
    for change in changes.tolist():
        before, after = segments[change].text, segments[change + 1].text
        space = before[len(before.rstrip()) :] if before[-2:].isspace() else ""
        sides.append((space, after[:1]) if len(space) > 1 and after else None)
    kinds = sorted({side for side in sides if side is not None})
    if not kinds:
        return np.zeros(len(changes), bool)
    alone = split(encoder.encode([space for space, _ in kinds]))
    joined = split(encoder.encode([space + after for space, after in kinds]))
    moved = {
        kind
        for kind, some, more in zip(kinds, alone, joined, strict=True)
        if not np.array_equal(more.ids[: len(some.ids)], some.ids)
    }
    return np.array([side in moved for side in sides], bool)


def _encode_cut(texts: Sequence[bytes], cuts: Sequence[Sequence[int]], encoder: Encoder) -> list[Tokens]:
    """Tokenize each text in pieces, cut at the given bytes."""
    first = encoder.encode([text[: at[0]].decode() for text, at in zip(texts, cuts, strict=True)])
    spans = [list(zip(at, [*at[1:], len(text)], strict=True)) for text, at in zip(texts, cuts, strict=True)]
    rest = encoder.encode_continuations(
        [text[start:end].decode() for text, at in zip(texts, spans, strict=True) for start, end in at]
    )
    firsts, rests = iter(split(first)), iter(split(rest))
    return [_joined([(0, next(firsts)), *((start, next(rests)) for start, _ in at)]) for at in spans]


def split(tokens: Tokens) -> list[Tokens]:
    """Return the tokens of each text."""
    bounds = np.concatenate([[0], np.cumsum(tokens.counts)]).tolist()
    return [_slice(tokens, i, i + 1, bounds) for i in range(len(tokens.counts))]


def _joined(parts: Sequence[tuple[int, Tokens]]) -> Tokens:
    """Return the tokens of one text from those of its pieces, each with the byte at which it starts."""
    return Tokens(
        np.concatenate([part.ids for _, part in parts]),
        np.array([sum(len(part.ids) for _, part in parts)]),
        np.concatenate([part.ends + start for start, part in parts]),
        np.concatenate([part.last + start for start, part in parts]),
    )


def replace_texts(tokens: Tokens, mended: Mapping[int, Tokens]) -> Tokens:
    """Return tokens with those of some texts replaced.

    Args:
        tokens: The tokens of all texts.
        mended: The new tokens of some texts, by the index of the text.
    """
    bounds = np.concatenate([[0], np.cumsum(tokens.counts)]).tolist()
    parts, done = [], 0
    for text in sorted(mended):
        parts += [_slice(tokens, done, text, bounds), mended[text]]
        done = text + 1
    return concatenate([*parts, _slice(tokens, done, len(tokens.counts), bounds)])


def _slice(tokens: Tokens, first: int, end: int, bounds: Sequence[int]) -> Tokens:
    """Return the tokens of the texts from `first` up to `end`; those of text i are `bounds[i]` to `bounds[i + 1]`."""
    part = slice(bounds[first], bounds[end])
    return Tokens(tokens.ids[part], tokens.counts[first:end], tokens.ends[part], tokens.last[part])


def concatenate(parts: Sequence[Tokens]) -> Tokens:
    """Return the tokens of all texts of several `Tokens`."""
    if not parts:
        return Tokens(np.zeros(0, np.int32), *(np.zeros(0, np.int64),) * 3)
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Tokens(*columns)


def byte_length(text: str) -> int:
    """Return the length of a text in UTF-8 bytes."""
    return len(text) if text.isascii() else len(text.encode())
