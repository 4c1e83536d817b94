"""The values that flow through the package, in the order in which they are made.

Record → list[Message] → Segments → TokenizedExample → rows of the plan → Batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
import torch

Longs = npt.NDArray[np.int64]
"""An array of counts or indices."""

IGNORE_INDEX = -100
"""Label of a token without a loss, as in `torch.nn.functional.cross_entropy`."""

Role = Literal["system", "user", "assistant", "tool", "text"]
"""Who speaks. `tool` is the answer of a tool that the assistant called; `text` is a plain document: it has no template,
and every token is supervised."""

LossOn = Literal["assistant", "last_turn", "all"]
"""Which messages are supervised unless they say so themselves (`Message.train`)."""


@dataclass(frozen=True)
class Record:
    """A row as stored."""

    fields: Mapping[str, Any]
    """The row's keys and values, untouched."""

    source: str
    """Name of the source in the YAML."""

    location: str
    """Where the row stands: `data/chat.jsonl, line 12` or `data/alpaca.json, record 3`."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    """Who speaks."""

    content: str
    """The text, without anything that a template adds."""

    context: str | None = None
    """Alpaca's `input`: what the instruction is about. The template decides how it joins the instruction."""

    train: bool | None = None
    """Whether the turn is supervised; `None` leaves it to `data.loss_on`."""

    weight: float = 1.0
    """Loss weight of each of the turn's supervised tokens."""

    extras: Mapping[str, Any] = field(default_factory=dict)
    """Further keys that a chat template may read: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`."""

    tools: Sequence[Mapping[str, Any]] = ()
    """On the first message only: the tools that the conversation offers, as JSON schemas."""


class Segment(NamedTuple):
    """A piece of rendered text; the segments of an example, joined, are what the template renders for serving."""

    text: str
    """The text as rendered."""

    supervised: bool
    """Whether its tokens have a loss."""

    weight: float = 1.0
    """Loss weight of each of its supervised tokens."""


@dataclass
class SharedPrompt:
    """Two documents of a row that begin with the same tokens, which stand in the row once.

    The row has the common beginning, the rest of the first document, and the rest of the second. The second rest sees
    the beginning and itself, but not the first rest. Not frozen: Lightning moves a batch to the device by setting the
    fields of copies of its dataclasses.
    """

    common: int
    """Tokens that both documents begin with."""

    first: int
    """Tokens of the rest of the first document."""

    second: int
    """Tokens of the rest of the second document."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the row."""
        return self.common + self.first + self.second


DocumentLength = int | SharedPrompt
"""Tokens of a document; two documents that share their beginning are one entry of a row."""


def num_tokens(length: DocumentLength) -> int:
    """Return how many tokens of the row an entry of its document lengths stands for."""
    return length.num_tokens if isinstance(length, SharedPrompt) else length


@dataclass(frozen=True)
class TokenizedExample:
    """A tokenized conversation: aligned, not shifted."""

    input_ids: npt.NDArray[np.int32]
    """Token ids, (L,)."""

    loss_weights: npt.NDArray[np.float32]
    """Loss weight of each token as a prediction target, (L,); 0 where it has no loss."""

    @property
    def document_length(self) -> DocumentLength:
        """Its entry in the document lengths of its row."""
        return len(self.input_ids)

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Position of each token, (L,)."""
        return np.arange(len(self.input_ids))


class Batch(TypedDict):
    """A micro-batch of packed rows, padded at the end to the longest row."""

    input_ids: torch.Tensor
    """Token ids, (B, S) int64."""

    labels: torch.Tensor
    """The token ids again where they are supervised, else `IGNORE_INDEX`; aligned, not shifted, (B, S) int64."""

    loss_weights: torch.Tensor
    """Loss weight of each label, (B, S) float32; 0 where the label is `IGNORE_INDEX`."""

    position_ids: torch.Tensor
    """Positions restarting at 0 in each document, (B, S) int64."""

    document_lengths: list[list[DocumentLength]]
    """Tokens of each document of each row; a row's padding is its last document, so that every row adds up to S. Two
    documents that share their beginning are one entry."""

    denominator: float
    """Supervised weight of the whole optimizer step that this micro-batch belongs to, over all ranks."""

    num_tokens: int
    """Tokens in the micro-batch without padding."""

    num_supervised: int
    """Tokens with a loss."""
