"""Tokens as a person reads them: the text that each one adds, with what the eye would miss made visible."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from sft_lightning.types import Message, Segment, TokenizedExample

_MAX_UNFINISHED = 16
"""Tokens to wait for the end of a character; it has at most 4 bytes, but a token may end one and begin another."""

_LINE_FEED = "\n"
_NAMED = {" ": "·", "\t": "⇥", _LINE_FEED: "↵", "\r": "␍", "\x7f": "␡", "\u00a0": "⍽"}
_JOINERS = "\u200c\u200d"
"""Inside a word or an emoji these shape what is shown, so that a mark in a running text would destroy it."""


class ShownToken(NamedTuple):
    """A token of an example."""

    position: int
    """From 0."""

    id: int
    name: str
    """As the vocabulary writes it: `Ġthe`, `▁the`, `<0x0A>`."""

    text: str
    """What it adds to the decoded text; empty for a token with a part of a character, which the last part has."""

    weight: float
    """Loss weight as a prediction target; 0 where it has no loss."""

    special: bool
    """Whether it is one of the tokenizer's added tokens, such as BOS and EOS."""


class Piece(NamedTuple):
    """A piece of a text: either as it stands, or the mark of a character that cannot be seen."""

    text: str
    is_mark: bool


@dataclass(frozen=True, kw_only=True)
class ShownExample:
    """An example with what it was made of."""

    location: str
    """Where its record stands."""

    name: str = ""
    """Which conversation of its record it is, `chosen` or `rejected`; empty for the only one."""

    number: int
    """Which of its record's examples it is, from 1."""

    num_of_record: int
    """Examples that the record makes; more than one where the template rewrites earlier turns."""

    repairs: Sequence[str]
    """What was repaired in the record: `leading_answer`, `trailing_user`, `empty_turn`."""

    messages: Sequence[Message]
    segments: Sequence[Segment]
    tokens: Sequence[ShownToken]

    @property
    def title(self) -> str:
        """What stands above it."""
        return f"{self.location}, {self.name}" if self.name else self.location

    @property
    def num_supervised(self) -> int:
        """Tokens with a loss."""
        return sum(token.weight > 0 for token in self.tokens)


@dataclass(frozen=True)
class ShownSource:
    """The first examples of a source."""

    name: str
    """Split and name: `train/alpaca`."""

    path: str
    format: str
    """As configured, or as the first record tells."""

    num_records: int
    """Records read."""

    examples: Sequence[ShownExample]
    left_out: Sequence[str] = ()
    """Why a record makes no example: reason and message, for each that is left out."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the examples shown."""
        return sum(len(example.tokens) for example in self.examples)

    @property
    def num_supervised(self) -> int:
        """Tokens with a loss in the examples shown."""
        return sum(example.num_supervised for example in self.examples)


def show_tokens(example: TokenizedExample, tokenizer: PreTrainedTokenizerFast) -> list[ShownToken]:
    """Return the tokens of an example with the text that each one adds."""

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
    """Return the text that each token adds to what is before it; joined, they are the decoded whole.

    Each token is decoded together with the ones before it, as servers that stream do (vLLM, `detokenizer_utils.py`):
    some tokenizers drop the leading space of what is decoded alone. A token that ends within a character gets an empty
    text, and the token that completes the character gets all of it.

    Args:
        ids: Token ids, (L,).
        decode: Ids → text.
    """
    texts: list[str] = []
    context, done = 0, 0  # tokens before `done` have their text; those from `context` on are what `decode` is told
    for end in range(1, len(ids) + 1):
        before, whole = decode(list(ids[context:done])), decode(list(ids[context:end]))
        if whole.endswith("\ufffd") and end < len(ids) and end - done < _MAX_UNFINISHED:
            texts.append("")
            continue
        texts.append(whole[len(before) :])
        context, done = done, end
    return texts


def visible(text: str, *, spaces: bool) -> Iterator[Piece]:
    """Yield a text with a mark for each character that cannot be seen.

    A line feed is kept after its mark, so that lines still break; any other such character is replaced by its mark:
    control characters, and those that change the direction of what follows.

    Args:
        text: Any text.
        spaces: Also mark spaces and joiners, as for a single token.
    """
    for i, piece in enumerate((_HIDDEN_AND_SPACES if spaces else _HIDDEN).split(text)):
        hidden = i % 2 == 1  # `split` with a group returns the matches too, between the rest
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
    """Match one character of Unicode's classes Cc (control), Cf (format), Zl and Zp (separators), below U+10000."""
    hidden = {chr(code) for code in range(0x10000) if unicodedata.category(chr(code)) in ("Cc", "Cf", "Zl", "Zp")}
    hidden = (hidden | {" ", "\u00a0"}) if spaces else (hidden - set(_JOINERS) - {"\u00ad"})
    return re.compile(f"([{re.escape(''.join(sorted(hidden)))}])")


_HIDDEN, _HIDDEN_AND_SPACES = _pattern(spaces=False), _pattern(spaces=True)
