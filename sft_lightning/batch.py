"""A micro-batch, and what is known of it on the CPU before any of it is on a device.

Whatever attention, the loss or the head would otherwise compute from token ids, lengths or labels on the device, and
wait for, is made here once, from arrays in CPU memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, TypedDict, TypeVar, cast

import torch
from typing_extensions import NotRequired, Self

from sft_lightning.types import IGNORE_INDEX, DocumentLength, SharedPrompt, num_tokens


class _MadeOnCpu:
    """Tensors that are copied to the device of the batch, beside values that stay in CPU memory."""

    on_device: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes that are tensors, or `None`, and are copied."""

    def to(self, device: torch.device | str, **options: Any) -> Self:
        """Return the same on a device, without waiting for the copy; Lightning calls this for each batch.

        Args:
            device: Where to copy the tensors.
            options: Ignored.
        """
        waits = torch.device(device).type in ("cpu", "mps")  # which may read a copy before it is there
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=not waits))

    def pin_memory(self) -> Self:
        """Return the same in page-locked memory, from which a GPU copies while the CPU goes on."""
        return self._mapped(torch.Tensor.pin_memory)

    def _mapped(self, function: Any) -> Self:
        made = copy(self)
        for name in self.on_device:
            tensor = getattr(self, name)
            setattr(made, name, None if tensor is None else function(tensor))
        return made


class DocumentLengths(_MadeOnCpu):
    """The documents of each row of a micro-batch, in the forms that attention takes; made once, on the CPU.

    Iterating gives the lengths of each row. It is not a `Sequence`, because Lightning would take that apart. Documents
    with a shared prompt are two documents for attention, whose keys both include the prompt: N counts them as two. The
    lengths and `cpu_starts` stay in CPU memory, so that nothing ever has to be read from the device.

    Args:
        rows: Tokens of each document of each row, every row adding up to the same width.
    """

    on_device = ("starts", "key_index")

    def __init__(self, rows: Sequence[Sequence[DocumentLength]]) -> None:
        self.rows = rows
        queries, keys, slices = split_shared_prompts([length for row in rows for length in row])
        self.cpu_starts = torch.tensor([[0, *accumulate(queries)], [0, *accumulate(keys)]], dtype=torch.int32)
        """Where each document starts among the queries and among the keys of all rows, and where the last one ends,
        (2, N + 1) int32, in CPU memory."""

        self.starts = self.cpu_starts
        """The same on the device of the batch."""

        self.lengths = (queries, keys)
        """Tokens of each document, among queries and among keys."""

        self.longest = (max(queries, default=0), max(keys, default=0))
        """Tokens of the longest document, among queries and among keys."""

        self.extent = torch.empty(()).expand(self.longest)
        """A tensor without memory whose sizes are `longest`: torch.compile compiles once for all sizes of a tensor, but
        again for other numbers."""

        self.key_index: torch.Tensor | None = None
        """Positions of all documents' keys in the flattened (B · S) rows, int64; `None` without shared prompts."""

        if len(slices) != len(queries):
            self.key_index = torch.cat([torch.arange(part.start, part.stop) for part in slices])

    @property
    def flash_arguments(self) -> dict[str, Any]:
        """The names that transformers' attention functions, and FlashAttention, know the documents by."""
        return {
            "cu_seq_lens_q": self.starts[0],
            "cu_seq_lens_k": self.starts[1],
            "max_length_q": self.longest[0],
            "max_length_k": self.longest[1],
        }

    def __getitem__(self, row: int) -> Sequence[DocumentLength]:
        return self.rows[row]

    def __iter__(self) -> Iterator[Sequence[DocumentLength]]:
        return iter(self.rows)

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


class SupervisedPositions(_MadeOnCpu):
    """Where the supervised tokens of a micro-batch are predicted: N positions, each one before its token.

    Args:
        labels: Aligned labels, (B, S) int64, in CPU memory.
    """

    on_device = ("flat", "rows", "columns", "column_index")

    def __init__(self, labels: torch.Tensor) -> None:
        self.rows, at = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        """Row of each position, (N,) int64."""

        self.flat = self.rows * labels.shape[1] + at
        """Each position in the flattened (B · S) micro-batch, (N,) int64."""

        self.columns, self.column_index = torch.unique(at, return_inverse=True)
        """The columns that contain a position, (C,) int64, and for each position its index among them, (N,) int64."""

    def __len__(self) -> int:
        return len(self.flat)


class RowSums(NamedTuple):
    """What rows add to their optimizer step, as Python numbers: comparing them waits for no device."""

    weight: float = 0.0
    """Supervised weight, which the denominator of the step adds up over its rows."""

    supervised: int = 0
    """Tokens with a loss."""

    def plus(self, other: RowSums) -> RowSums:
        """Return the sums of these rows and of others."""
        return RowSums(self.weight + other.weight, self.supervised + other.supervised)


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

    supervised: SupervisedPositions
    """The positions that predict tokens with a loss."""

    planned: NotRequired[RowSums]
    """What the rows add up to in the token store, by the plan; set by the loaders of the data module."""

    collated: NotRequired[RowSums]
    """What they add up to in `labels` and `loss_weights`, before these are copied to a device; set with `planned`."""


AnyBatch = TypeVar("AnyBatch", bound=Batch)


def batch_to(batch: AnyBatch, device: torch.device) -> AnyBatch:
    """Return a batch with its tensors on a device.

    Args:
        batch: A micro-batch.
        device: Where to copy them.
    """
    movable = (torch.Tensor, _MadeOnCpu)
    moved = {key: value.to(device) if isinstance(value, movable) else value for key, value in batch.items()}
    return cast("AnyBatch", moved)


def pinned(batch: AnyBatch) -> AnyBatch:
    """Return a batch whose tensors are in page-locked memory, from which a GPU copies while the CPU goes on.

    Args:
        batch: A micro-batch in CPU memory.
    """
    movable = (torch.Tensor, _MadeOnCpu)
    locked = {key: value.pin_memory() if isinstance(value, movable) else value for key, value in batch.items()}
    return cast("AnyBatch", locked)
