"""The values that flow through the package, in the order in which they are made.

Record → list[Message] → Segments → TokenizedExample → rows of the plan → Batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Longs = npt.NDArray[np.int64]
"""An array of counts or indices."""

IGNORE_INDEX = -100
"""Label of a token without a loss, as in `torch.nn.functional.cross_entropy`."""

Role = Literal["system", "user", "assistant", "tool", "text"]
"""Author of a message. A `tool` message is the result of a tool that the assistant called; a `text` message is a plain
document without a template."""

LossOn = Literal["assistant", "last_turn", "all"]
"""Which messages are supervised unless they have a `train` of their own."""


@dataclass(frozen=True)
class Record:
    """A row of a source as stored."""

    fields: Mapping[str, Any]
    """The row's keys and values, unchanged."""

    source: str
    """Name of the source in the YAML."""

    location: str
    """Where to find the row: `data/chat.jsonl, line 12` or `data/alpaca.json, record 3`."""


@dataclass(frozen=True)
class Message:
    """A message of a conversation, or a piece of a document."""

    role: Role
    """Author of the message."""

    content: str
    """The text, without what a template adds."""

    context: str | None = None
    """Alpaca's `input`: the text that the instruction is about. The template decides how the two are joined."""

    train: bool | None = None
    """Whether the message is supervised; `None` leaves it to `data.loss_on`."""

    weight: float = 1.0
    """Loss weight of each supervised token of the message."""

    extras: Mapping[str, Any] = field(default_factory=dict)
    """Further keys that a chat template may read: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`."""

    tools: Sequence[Mapping[str, Any]] = ()
    """The tools of the conversation as JSON schemas; on the first message only."""


class Segment(NamedTuple):
    """A piece of rendered text; the segments of an example, joined, are what the template renders for serving."""

    text: str
    """The rendered text."""

    supervised: bool
    """Whether its tokens have a loss."""

    weight: float = 1.0
    """Loss weight of each of its tokens, if supervised."""


@dataclass
class SharedPrompt:
    """Two documents of a row that begin with the same tokens; the row has these tokens once.

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
    """A tokenized conversation or document; token ids and loss weights are aligned, not shifted."""

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
