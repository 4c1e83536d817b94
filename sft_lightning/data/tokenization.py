"""Segments → TokenizedExample: exact loss masks by construction.

The segments are joined and the whole text is tokenized once, so the ids are those that serving makes of the same text.
The tokenizer's offsets say which characters each token covers, and so which segment it belongs to; nothing is searched
for. One thing is added: no token may straddle the border between a prompt and its answer, because at serving the prompt
is tokenized alone. Where the tokenizer would merge across it, the text is cut at that border.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sft_lightning.errors import UserError
from sft_lightning.types import Segment, TokenizedExample


class Encoding(NamedTuple):
    """Tokens of a text."""

    ids: npt.NDArray[np.int32]
    """Token ids, (L,)."""

    offsets: npt.NDArray[np.int64]
    """First character and end of each token in the text, (L, 2)."""


Encode = Callable[[list[str]], list[Encoding]]
"""Texts → encodings, adding no special tokens; special tokens written in the text are recognised."""

_ANCHORS = ("\n", "a", ".", "0")
"""Characters to stand before a text that continues another, so that the tokenizer adds no prefix space to it."""


def tokenize(examples: Sequence[Sequence[Segment]], encode: Encode) -> list[TokenizedExample]:
    """Tokenize examples, each a list of segments.

    Args:
        examples: Segments whose texts, joined, are the example.
        encode: The tokenizer.

    Raises:
        UserError: If a text cannot be cut at the border of an answer.
    """
    encodings = encode(["".join(segment.text for segment in segments) for segments in examples])
    return [_weigh(segments, encoding, encode) for segments, encoding in zip(examples, encodings, strict=True)]


def _weigh(segments: Sequence[Segment], encoding: Encoding, encode: Encode) -> TokenizedExample:
    ends = np.cumsum([len(segment.text) for segment in segments])
    weights = np.array([segment.weight if segment.supervised else 0.0 for segment in segments], np.float32)
    borders = ends[:-1][np.diff(weights) != 0]
    cuts: set[int] = set()
    while straddled := _straddled(encoding, borders) - cuts:
        cuts |= straddled
        encoding = _encode_in_pieces("".join(segment.text for segment in segments), sorted(cuts), encode)
    owner = np.searchsorted(ends, _characters(encoding), side="right")
    return TokenizedExample(encoding.ids, weights[np.minimum(owner, len(segments) - 1)])


def _token_ends(encoding: Encoding) -> npt.NDArray[np.int64]:
    """End of each token; the tokens tile the text, so a token starts where the one before it ends.

    The offsets' own starts would not do: byte-level tokenizers leave leading spaces out of them.
    """
    return np.maximum.accumulate(encoding.offsets[:, 1]) if len(encoding.ids) else encoding.offsets[:, 1]


def _characters(encoding: Encoding) -> npt.NDArray[np.int64]:
    """For each token, the index of the last character it covers; of the next one, if it covers none."""
    ends = _token_ends(encoding)
    starts = np.concatenate([[0], ends[:-1]])
    covers_none = (encoding.offsets[:, 0] >= encoding.offsets[:, 1]) & (starts == ends)
    return np.where(covers_none, ends, ends - 1)


def _straddled(encoding: Encoding, borders: npt.NDArray[np.int64]) -> set[int]:
    """Return the borders at which no token ends."""
    return set(borders.tolist()) - set(_token_ends(encoding).tolist()) - {0}


def _encode_in_pieces(text: str, cuts: list[int], encode: Encode) -> Encoding:
    starts, ends = [0, *cuts], [*cuts, len(text)]
    pieces = [encode([text[: ends[0]]])[0]]
    pieces += [_encode_continuation(text[start:end], encode) for start, end in zip(starts[1:], ends[1:], strict=True)]
    return Encoding(
        np.concatenate([piece.ids for piece in pieces]),
        np.concatenate([piece.offsets + start for piece, start in zip(pieces, starts, strict=True)]),
    )


def _encode_continuation(text: str, encode: Encode) -> Encoding:
    """Tokenize a text that continues another one: without the space that some tokenizers put before a text."""
    for anchor in _ANCHORS:
        alone, joined = encode([anchor, anchor + text])
        skip = len(alone.ids)
        if np.array_equal(joined.ids[:skip], alone.ids) and _token_ends(joined)[skip - 1] == len(anchor):
            return Encoding(joined.ids[skip:], joined.offsets[skip:] - len(anchor))
    raise UserError(f"the tokenizer cannot tokenize {text[:40]!r} as the continuation of another text")
