"""Records → prompts that `predict` and the samples of a run have the model answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from sft_lightning.data.formats.registry import Malformed, to_messages
from sft_lightning.data.plan.split_reader import Split, SplitReader
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.types import Message, Record

PromptBatch = list[dict[str, str]]
"""Prompts to answer, each with the keys `prompt`, `source`, `location` and, if the data has an answer, `reference`."""

_BEGINNING = 80
"""Characters at the start of a document that the model continues."""


class PromptLoader:
    """One rank's batches of prompts; the ranks take batches in turn.

    Args:
        prompts: The prompts of all ranks, in the order of the data.
        batch_size: Prompts per batch.
        rank: This rank, from 0.
        world_size: Number of ranks.
    """

    def __init__(self, prompts: PromptBatch, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.prompts = prompts
        self.batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self.num_answered = 0
        """Number of this rank's first batches that an earlier run has answered; they are empty."""

    def __len__(self) -> int:
        """Batches, the same number for every rank; the last one may be empty."""
        return math.ceil(len(self.prompts) / (self.batch_size * self._world_size))

    def __iter__(self) -> Iterator[PromptBatch]:
        for number in range(len(self)):
            yield [] if number < self.num_answered else self._batch(number)

    @property
    def batch_lengths(self) -> list[int]:
        """Number of prompts in each of this rank's batches."""
        return [len(self._batch(number)) for number in range(len(self))]

    def _batch(self, number: int) -> PromptBatch:
        start = (number * self._world_size + self._rank) * self.batch_size
        return self.prompts[start : start + self.batch_size]


def prompts_of(
    reader: SplitReader, split: Split, limit: int | None = None, *, log: Callable[[str], None] | None = None
) -> PromptBatch:
    """Return a prompt for each record of a split, in the order of the data.

    Args:
        reader: Reads the splits.
        split: Which split.
        limit: Prompts at most; `None`: all.
        log: Gets a line about the malformed records that were left out.

    Raises:
        UserError: If a record does not match its format.
    """
    left_out: list[str] = []
    prompts = (
        prompt
        for name, config in reader.sources(split).items()
        for prompt in make_prompts(reader.builder, reader.records(split, name), config, left_out=left_out)
    )
    taken = list(islice(prompts, limit))
    if left_out and log is not None:
        log(f"data.malformed: drop left {len(left_out)} records without a prompt, the first at {left_out[0]}")
    return taken


def make_prompts(
    builder: ExampleBuilder, records: Iterable[Record], source: SourceConfig, *, left_out: list[str] | None = None
) -> Iterator[dict[str, str]]:
    """Yield a prompt for each record: the record up to its last answer, which is the reference.

    Args:
        builder: Makes examples from records; says what to do with malformed ones.
        records: The records.
        source: Their source.
        left_out: Gets the locations of malformed records that have no prompt.

    Raises:
        UserError: If a record does not match its format.
    """
    format_name = ""
    for record in records:
        format_name = format_name or builder.format_of(record, source.format, source.path)
        try:
            messages = to_messages(record, format_name, answered=False)
        except Malformed:
            if builder.malformed == "error":
                raise
            if left_out is not None:
                left_out.append(record.location)
            continue
        yield _prompt(builder, record, messages)


def _prompt(builder: ExampleBuilder, record: Record, messages: Sequence[Message]) -> dict[str, str]:
    prompt = {"source": record.source, "location": record.location}
    last = messages[-1]
    if last.role == "assistant" or (last.role == "text" and len(messages) > 1):
        prompt["reference"] = last.content
        messages = messages[:-1]
    elif last.role == "text" and last.train is not False:  # a document, not the prompt of a completion
        beginning = last.content[:_BEGINNING].rpartition(" ")[0] or last.content[:_BEGINNING]
        messages = [replace(last, content=beginning)]
    return {**prompt, "prompt": builder.template_for(messages).generation_prompt(messages)}
