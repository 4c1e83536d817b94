"""One source that is read and tokenized while training, pass after pass, and counted as it is read."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sft_lightning.data.plan.blending import BlendConfig, BlendUnit
from sft_lightning.data.plan.split_examples import WAYS_TO_KEEP_EXAMPLES, LengthLimits, apply_limits, report_records
from sft_lightning.data.sources.report import MAX_LOCATIONS, SourceReport
from sft_lightning.data.sources.source import SourceConfig, read_records
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.data.tokens.flat_examples import flat_examples
from sft_lightning.data.tokens.record_log import RecordLog
from sft_lightning.data.tokens.tokenization import TokenizedBatch
from sft_lightning.errors import UserError
from sft_lightning.types import Record, TokenizedExample

RECORDS_AT_ONCE = 256
"""Records that are read and tokenized together; a source is read this far ahead of a window at most."""

_COUNTS = (
    "records", "examples", "tokens", "supervised_tokens", "rewritten_records", "rewritten_examples", "truncated",
    "supervised_tokens_lost",
)  # fmt: skip


@dataclass
class StreamReport(SourceReport):
    """Counts of a streamed source since the run was last started, including the records read ahead."""

    streaming: bool = True
    """Tells a reader of `data_report.json` that the counts are those of a stream."""

    passes: int = 0
    """Times that the source was read to its end, over the whole run; a record counts once in each pass."""


class Cursor(NamedTuple):
    """How much of a source has been taken."""

    passes: int = 0
    """Complete passes over the source."""

    record: int = 0
    """The last record of this pass from which examples were taken; the records before it are used up."""

    examples: int = 0
    """Examples of that record that were taken."""


class SourceStream:
    """A source as an endless sequence of examples: the first record follows the last.

    Args:
        name: The source's name in the YAML.
        config: The source.
        builder: Makes examples from records.
        limits: Which lengths are kept.

    Raises:
        UserError: If the source has no record, or its format cannot be told.
    """

    def __init__(self, name: str, config: SourceConfig, builder: ExampleBuilder, limits: LengthLimits) -> None:
        self.name = name
        self.config = config
        self.report = StreamReport("train")
        self._builder = builder
        self._limits = limits
        self._lengths: Counter[int] = Counter()
        first = next(read_records(name, config), None)
        if first is None:
            raise UserError(
                f"data.sources.{name}.path: {config.path!r} holds no records, so there is nothing to train on"
            )
        self.report.format = builder.format_of(first, config.format, config.path)

    def examples(self, cursor: Cursor = Cursor()) -> Iterator[tuple[Cursor, TokenizedExample]]:  # noqa: B008 (a tuple)
        """Yield the examples after a position, each with the position after it; nothing before is tokenized again.

        Raises:
            UserError: If a record is wrong, an example too long, or a whole pass leaves no example.
        """
        while True:
            record, taken, found = cursor.record, 0, cursor.examples > 0
            for index, example in self._pass(cursor.record):
                record, taken = index, taken + 1 if index == record else 1
                if index > cursor.record or taken > cursor.examples:
                    found = True
                    yield Cursor(cursor.passes, index, taken), example
            if not found and cursor.record == 0:
                raise UserError(
                    f"data.sources.{self.name}: no example is left to train on; dropped: {dict(self.report.dropped)}; "
                    f"{WAYS_TO_KEEP_EXAMPLES}"
                )
            cursor = Cursor(cursor.passes + 1)
            self.report.passes = cursor.passes

    def _pass(self, first: int) -> Iterator[tuple[int, TokenizedExample]]:
        """Yield the examples of the records from `first` to the last, each with the index of its record."""
        records = islice(read_records(self.name, self.config), first, None)
        while chunk := list(islice(records, RECORDS_AT_ONCE)):
            yield from ((first + record, example) for record, example in self._tokenize(chunk))
            first += len(chunk)

    def _tokenize(self, chunk: Sequence[Record]) -> Iterator[tuple[int, TokenizedExample]]:
        """Yield the examples of some records that the limits keep, each with the index of its record in the chunk."""
        log = RecordLog(format=self.report.format)
        built = list(self._builder.build(chunk, self.config.format, self.config.path, log))
        examples = flat_examples(join_batches([batch for batch, _ in built]))
        records = np.concatenate([np.zeros(0, np.int64), *(each for _, each in built)])
        report = report_records("train", log.facts(), log.marks_array(), records, np.ones(len(chunk), bool))
        kept = apply_limits(
            examples, examples.lengths, self._limits, report, lambda index: chunk[records[index]].location
        )
        self._count(report, examples.lengths)
        for index in np.flatnonzero(kept).tolist():
            yield int(records[index]), examples.example(index, 0, int(kept[index]))

    def _count(self, part: SourceReport, lengths: npt.NDArray[np.int64]) -> None:
        """Add the counts of a chunk to the report."""
        report = self.report
        for name in _COUNTS:
            setattr(report, name, getattr(report, name) + getattr(part, name))
        report.dropped += part.dropped
        report.repairs += part.repairs
        for reason, places in part.dropped_at.items():
            report.dropped_at[reason] = [*report.dropped_at.get(reason, []), *places][:MAX_LOCATIONS]
        self._lengths.update(lengths.tolist())
        distinct = sorted(self._lengths)
        if distinct:
            so_far = np.cumsum([self._lengths[length] for length in distinct])
            wanted = np.searchsorted(so_far, so_far[-1] * np.array([0.5, 0.9, 0.99, 1.0]))
            report.length_p50, report.length_p90, report.length_p99, report.longest = (distinct[i] for i in wanted)


def join_batches(batches: Sequence[TokenizedBatch]) -> TokenizedBatch:
    """Put the examples of several batches one after the other."""
    return TokenizedBatch(
        np.concatenate([np.zeros(0, np.int32), *(batch.input_ids for batch in batches)]),
        np.concatenate([np.zeros(0, np.float32), *(batch.loss_weights for batch in batches)]),
        np.concatenate([np.zeros(0, np.int64), *(batch.counts for batch in batches)]),
    )


def stream_shares(sources: Sequence[SourceConfig], blend: BlendConfig) -> list[float]:
    """Return each source's share of the training data, 0 to 1.

    Args:
        sources: Training sources; `weight` is a share, whatever `blend.by` counts.
        blend: Its temperature is applied.
    """
    weights = np.array([source.weight for source in sources], np.float64)
    wanted = (weights / weights.sum()) ** (1 / blend.temperature)
    result: list[float] = (wanted / wanted.sum()).tolist()
    return result


def stream_share_unit(blend: BlendConfig) -> BlendUnit:
    """Return what the shares of streams are counted in: tokens if the weights would be passes over the sources."""
    return "tokens" if blend.by == "epochs" else blend.by


def open_streams(
    sources: Mapping[str, SourceConfig], builder: ExampleBuilder, limits: LengthLimits
) -> list[SourceStream]:
    """Return the training sources as streams, with their formats found; reads only the first record of each.

    Args:
        sources: Training sources.
        builder: Makes examples from records.
        limits: Which lengths are kept.

    Raises:
        UserError: If a source has no record, or its format cannot be told.
    """
    # A thread tokenizes while the trainer tokenizes prompts of samples: each needs its own tokenizer.
    builder = replace(builder, tokenizer=copy.deepcopy(builder.tokenizer))
    return [SourceStream(name, config, builder, limits) for name, config in sources.items()]


def describe_streams(sources: Mapping[str, SourceConfig], blend: BlendConfig) -> str:
    """Return a line that says which sources are streamed, and what other settings mean then.

    Args:
        sources: Training sources.
        blend: What their weights mean for stored sources.
    """
    stored = [name for name, config in sources.items() if not config.streaming]
    text = f"data.sources: {', '.join(sources)} are read and tokenized during training; no token store is written"
    if stored:
        text += f"; this includes {', '.join(stored)}: if one training source is streamed, all are"
    if len(sources) > 1 and blend.by == "epochs":
        text += "; weights are shares of tokens (data.blend.by: epochs is not available for streams)"
    return text
