"""Tokens for people to read: the text that each token adds, with marks for invisible characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from sft_lightning.types import Message, Segment, TokenizedExample

_MAX_UNFINISHED = 16
"""Tokens to wait for the end of a character: it has at most 4 bytes, but a token may end one and begin another."""

_LINE_FEED = "\n"
_NAMED = {" ": "·", "\t": "⇥", _LINE_FEED: "↵", "\r": "␍", "\x7f": "␡", "\u00a0": "⍽"}
_JOINERS = "\u200c\u200d"
"""Zero-width joiners: inside a word or an emoji they change its shape, so a mark in their place would break it."""


class ShownToken(NamedTuple):
    """A token of an example."""

    position: int
    """Position in the example, from 0."""

    id: int
    """Token id."""

    name: str
    """The token in the vocabulary: `Ġthe`, `▁the`, `<0x0A>`."""

    text: str
    """Text that it adds to the decoded text; empty if it ends within a character, which the last of its tokens has."""

    weight: float
    """Loss weight as a prediction target; 0 where it has no loss."""

    special: bool
    """Whether it is one of the tokenizer's added tokens, such as BOS and EOS."""


class Piece(NamedTuple):
    """A piece of a text, or the mark of an invisible character."""

    text: str
    """The text, or the mark."""

    is_mark: bool
    """Whether it is a mark."""


@dataclass(frozen=True, kw_only=True)
class ShownExample:
    """An example with the messages and segments that it was made of."""

    location: str
    """Location of its record."""

    name: str = ""
    """Which conversation of its record it is, `chosen` or `rejected`; empty for the only one."""

    number: int
    """Number of the example among those of its record, from 1."""

    num_of_record: int
    """Examples of the record; more than one where the template rewrites earlier answers."""

    repairs: Sequence[str]
    """What was repaired in the record: `leading_answer`, `trailing_user`, `empty_turn`."""

    messages: Sequence[Message]
    """The messages of the conversation."""

    segments: Sequence[Segment]
    """The rendered text of the example."""

    tokens: Sequence[ShownToken]
    """The tokens of the example."""

    @property
    def title(self) -> str:
        """The heading of the example."""
        return f"{self.location}, {self.name}" if self.name else self.location

    @property
    def num_supervised(self) -> int:
        """Number of tokens with a loss."""
        return sum(token.weight > 0 for token in self.tokens)


@dataclass(frozen=True)
class ShownSource:
    """The first examples of a source."""

    name: str
    """Split and name: `train/alpaca`."""

    path: str
    """The source's `path`."""

    format: str
    """The format of the records, configured or detected."""

    num_records: int
    """Number of records read."""

    examples: Sequence[ShownExample]
    """The examples of those records."""

    dropped: Sequence[str] = ()
    """Reason and message for each record that is dropped."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the examples."""
        return sum(len(example.tokens) for example in self.examples)

    @property
    def num_supervised(self) -> int:
        """Number of tokens with a loss of the examples."""
        return sum(example.num_supervised for example in self.examples)


def show_tokens(example: TokenizedExample, tokenizer: PreTrainedTokenizerFast) -> list[ShownToken]:
    """Return the tokens of an example with the text that each one adds.

    Args:
        example: The example.
        tokenizer: Its tokenizer.
    """

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    ids = example.input_ids.tolist()
    names = tokenizer.convert_ids_to_tokens(ids)
    special = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    texts = token_texts(ids, decode)
    return [
        ShownToken(position, token, str(name), text, weight, token in special)
        for position, (token, name, text, weight) in enumerate(
            zip(ids, names, texts, example.loss_weights.tolist(), strict=True)
        )
    ]


def token_texts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """Return the text that each token adds to the decoded text; joined, they are the whole decoded text.

    Each token is decoded together with the ones before it, as in servers that stream (vLLM, `detokenizer_utils.py`),
    because some tokenizers drop a leading space. A token that ends within a character gets an empty text, and the token
    that completes the character gets all of it.

    Args:
        ids: Token ids, (L,).
        decode: Ids → text.
    """
    texts: list[str] = []
    context, done = 0, 0  # tokens before `done` have their text; `decode` gets those from `context` on
    for end in range(1, len(ids) + 1):
        before, whole = decode(list(ids[context:done])), decode(list(ids[context:end]))
        if whole.endswith("\ufffd") and end < len(ids) and end - done < _MAX_UNFINISHED:
            texts.append("")
            continue
        texts.append(whole[len(before) :])
        context, done = done, end
    return texts


def visible(text: str, *, spaces: bool) -> Iterator[Piece]:
    """Yield the pieces of a text, with a mark for each invisible character.

    The mark replaces the character; only a line feed is kept after its mark, so that lines still break. Invisible are
    control characters, and characters that change the direction of the text that follows.

    Args:
        text: Any text.
        spaces: Whether to mark spaces and joiners, too, as for a single token.
    """
    for i, piece in enumerate((_HIDDEN_AND_SPACES if spaces else _HIDDEN).split(text)):
        hidden = i % 2 == 1  # `split` with a group returns the matches between the other pieces
        if piece:
            yield Piece(_mark(piece) if hidden else piece, hidden)
        if hidden and piece == _LINE_FEED:
            yield Piece(piece, False)


def _mark(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))  # Unicode's pictures of the control characters
    return f"⟨U+{ord(character):04X}⟩"


def _pattern(spaces: bool) -> re.Pattern[str]:
    """Return a pattern for one character below U+10000 of Unicode's classes Cc (control), Cf (format), Zl, Zp."""
    hidden = {chr(code) for code in range(0x10000) if unicodedata.category(chr(code)) in ("Cc", "Cf", "Zl", "Zp")}
    hidden = (hidden | {" ", "\u00a0"}) if spaces else (hidden - set(_JOINERS) - {"\u00ad"})
    return re.compile(f"([{re.escape(''.join(sorted(hidden)))}])")


_HIDDEN, _HIDDEN_AND_SPACES = _pattern(spaces=False), _pattern(spaces=True)
