"""The values that flow through the package, in the order in which they are made.

Record → list[Message] → Segments → TokenizedExample → rows of the plan → Batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, NamedTuple, Self, TypedDict, overload

import numpy as np
import numpy.typing as npt
import torch

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


class DocumentLengths(Sequence[Sequence[DocumentLength]]):
    """The documents of each row of a micro-batch, in the forms that attention takes; made once, on the host.

    As a sequence it has the lengths of each row. Documents with a shared prompt are two documents for attention, whose
    keys both include the prompt: N counts them as two. Moving it to a device copies without waiting, and leaves the
    lengths and `host_starts` where they are, so that nothing ever has to be read from the device.

    Args:
        rows: Tokens of each document of each row, every row adding up to the same width.
    """

    def __init__(self, rows: Sequence[Sequence[DocumentLength]]) -> None:
        self.rows = rows
        queries, keys, slices = split_shared_prompts([length for row in rows for length in row])
        self.host_starts = torch.tensor([[0, *accumulate(queries)], [0, *accumulate(keys)]], dtype=torch.int32)
        """Where each document starts among the queries and among the keys of all rows, and where the last one ends,
        (2, N + 1) int32, in CPU memory."""

        self.starts = self.host_starts
        """The same on the device of the batch."""

        self.lengths = (queries, keys)
        """Tokens of each document, among queries and among keys."""

        self.longest = (max(queries, default=0), max(keys, default=0))
        """Tokens of the longest document, among queries and among keys."""

        self.key_index: torch.Tensor | None = None
        """Positions of all documents' keys in the flattened (B · S) rows, int64; `None` without shared prompts."""

        if len(slices) != len(queries):
            self.key_index = torch.cat([torch.arange(part.start, part.stop) for part in slices])

    def to(self, device: torch.device | str, **options: Any) -> Self:
        """Return the same documents on a device; Lightning calls this for each batch."""
        moved = copy(self)
        moved.starts = self.starts.to(device, non_blocking=True)
        moved.key_index = None if self.key_index is None else self.key_index.to(device, non_blocking=True)
        return moved

    def pin_memory(self) -> Self:
        """Return the same documents in page-locked memory, from which a GPU copies while the CPU goes on."""
        pinned = copy(self)
        pinned.starts = self.starts.pin_memory()
        pinned.key_index = None if self.key_index is None else self.key_index.pin_memory()
        return pinned

    @property
    def flash_arguments(self) -> dict[str, Any]:
        """The names that transformers' attention functions, and FlashAttention, know the documents by."""
        return {
            "cu_seq_lens_q": self.starts[0],
            "cu_seq_lens_k": self.starts[1],
            "max_length_q": self.longest[0],
            "max_length_k": self.longest[1],
        }

    @overload
    def __getitem__(self, index: int) -> Sequence[DocumentLength]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sequence[DocumentLength]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        return self.rows == (other.rows if isinstance(other, DocumentLengths) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"DocumentLengths({self.rows})"


def split_shared_prompts(
    lengths: Sequence[DocumentLength],
) -> tuple[list[int], list[int], list[slice]]:
    """Split documents with a shared prompt into two, whose keys and values both include the prompt.

    Args:
        lengths: Lengths of all documents of all rows, in order.

    Returns:
        The number of query tokens of each document, its number of key tokens, and the slices of the flat keys which,
        concatenated, are the keys of all documents.
    """
    query_lengths: list[int] = []
    key_lengths: list[int] = []
    key_slices: list[slice] = []
    start = 0
    for length in lengths:
        end = start + num_tokens(length)
        if isinstance(length, SharedPrompt):
            rest = start + length.common + length.first
            query_lengths += [rest - start, end - rest]
            key_lengths += [rest - start, length.common + end - rest]
            key_slices += [slice(start, rest), slice(start, start + length.common), slice(rest, end)]
        else:
            query_lengths.append(length)
            key_lengths.append(length)
            key_slices.append(slice(start, end))
        start = end
    return query_lengths, key_lengths, key_slices


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


class Batch(TypedDict):
    """A micro-batch of packed rows, padded at the end to the longest row."""

    input_ids: torch.Tensor
    """Token ids, (B, S) int64."""

    labels: torch.Tensor
    """Token ids of supervised tokens, else `IGNORE_INDEX`; aligned with `input_ids`, not shifted, (B, S) int64."""

    loss_weights: torch.Tensor
    """Loss weight of each label, (B, S) float32; 0 where the label is `IGNORE_INDEX`."""

    position_ids: torch.Tensor
    """Positions restarting at 0 in each document, (B, S) int64."""

    document_lengths: DocumentLengths
    """Tokens of each document of each row; a row's padding is its last document, so that every row adds up to S. Two
    documents that share their beginning are one entry."""

    denominator: float
    """Supervised weight of the whole optimizer step that this micro-batch belongs to, over all ranks."""

    num_tokens: int
    """Number of tokens in the micro-batch without padding."""

    num_supervised: int
    """Number of tokens with a loss."""
