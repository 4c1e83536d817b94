"""Token stores → the examples of a split: which records are in it, how much of each example is kept, all counted."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from sft_lightning.data.plan.blending import BlendUnit
from sft_lightning.data.plan.splits import Mask
from sft_lightning.data.sources.report import MAX_LOCATIONS, SourceReport
from sft_lightning.data.tokens.flat_examples import FlatExamples
from sft_lightning.data.tokens.record_log import REWRITTEN
from sft_lightning.data.tokens.store import TokenStore
from sft_lightning.data.tokens.store_cache import Prepared
from sft_lightning.errors import UserError
from sft_lightning.types import Longs, TokenizedExample

Overlong = Literal["error", "drop", "truncate"]


WAYS_TO_KEEP_EXAMPLES = "correct the records, or change data.max_length, data.overlong or data.min_length"
"""What to do if every example was dropped, for messages."""


@dataclass(frozen=True, kw_only=True)
class LengthLimits:
    """Which lengths of examples are kept, and what is done with the others."""

    max_length: int
    """Tokens per row."""

    min_length: int = 0
    """Examples with fewer tokens are dropped."""

    overlong: Overlong = "error"
    """What to do with an example that is longer than a row."""

    cuts_examples: bool = False
    """Whether packing cuts examples (`concat`), so that none is too long."""


@dataclass(frozen=True)
class SplitExamples:
    """The examples that a split has of one source."""

    name: str
    """The source's name in the YAML."""

    store: TokenStore
    """All N examples of the source."""

    kept: Longs
    """Tokens kept of each example of the store, (N,); 0 for an example that is not in the split."""

    report: SourceReport
    """Counts."""

    content: str
    """Checksums of the tokens and weights."""

    @property
    def indices(self) -> Longs:
        """The examples that are in the split, as indices into the store."""
        return np.flatnonzero(self.kept)

    def amounts(self, unit: BlendUnit) -> npt.NDArray[np.float64]:
        """Return what each example of the split counts in a unit of the blend, (len(indices),)."""
        indices = self.indices
        if unit == "supervised_tokens":
            return self.store.supervise(first_tokens(indices, self.kept[indices])).astype(np.float64)
        return self.kept[indices].astype(np.float64) if unit == "tokens" else np.ones(len(indices))


class JoinedExamples:
    """The examples of several sources, numbered through all of them: N examples of every store.

    Args:
        parts: The examples of each source, in the order of the sources.
    """

    def __init__(self, parts: Sequence[SplitExamples]) -> None:
        self.parts = parts
        self.firsts = np.cumsum([0, *(len(part.kept) for part in parts)])
        """The number of each source's first example, and N, (sources + 1,)."""
        self.kept = np.concatenate([part.kept for part in parts])
        """Tokens kept of each example, (N,)."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens and of how much of each example is kept."""
        digest = xxhash.xxh3_128()
        for part in self.parts:
            digest.update(part.content.encode())
            digest.update(np.ascontiguousarray(part.kept).data)
        return digest.hexdigest()

    def example(self, index: int, start: int, stop: int) -> TokenizedExample:
        """Return tokens of an example.

        Args:
            index: Number of the example.
            start: Its first token to take.
            stop: Its first token not to take.
        """
        part, first = self._part_of(index)
        return part.store.example(index - first, start, stop)

    def record(self, index: int) -> tuple[str, int]:
        """Return the source of an example, and the index of the record that it was made from."""
        part, first = self._part_of(index)
        return part.name, int(part.store.records[index - first])

    def _part_of(self, index: int) -> tuple[SplitExamples, int]:
        """Return the source that an example is from, and the number of the source's first example."""
        part = int(np.searchsorted(self.firsts, index, side="right")) - 1
        return self.parts[part], int(self.firsts[part])

    def weigh(self, documents: Longs) -> npt.NDArray[np.float64]:
        """Return the loss weight that each document contributes, (D,); see `FlatExamples.weigh`."""
        weights = np.zeros(len(documents))
        for mine, store, own in self._by_store(documents):
            weights[mine] = store.weigh(own)
        return weights

    def supervise(self, documents: Longs) -> Longs:
        """Return how many tokens of each document are supervised, (D,); see `FlatExamples.supervise`."""
        supervised = np.zeros(len(documents), np.int64)
        for mine, store, own in self._by_store(documents):
            supervised[mine] = store.supervise(own)
        return supervised

    def _by_store(self, documents: Longs) -> Iterator[tuple[Longs, TokenStore, Longs]]:
        """Yield the documents of each source that has some: their indices, and the documents as its store numbers them.

        Args:
            documents: Example, first token and end of each, (D, 3).
        """
        owners = np.searchsorted(self.firsts, documents[:, 0], side="right") - 1
        for part in np.flatnonzero(np.bincount(owners)).tolist():
            mine = np.flatnonzero(owners == part)
            yield mine, self.parts[part].store, documents[mine] - [self.firsts[part], 0, 0]


def first_tokens(examples: Longs, lengths: Longs) -> Longs:
    """Return the documents that the first tokens of examples are: (example, 0, length) of each, (N, 3).

    Args:
        examples: Which examples, (N,).
        lengths: Tokens to take of each, (N,).
    """
    return np.stack([examples, np.zeros_like(examples), lengths], axis=1)


def select_examples(
    name: str, split: str, prepared: Prepared, members: Mask, limits: LengthLimits, locate: Callable[[int], str]
) -> SplitExamples:
    """Select the examples that a split has of a source, apply the limits, and count.

    Args:
        name: The source's name.
        split: train, val or test.
        prepared: The source, tokenized.
        members: Which records are in the split, (records,).
        limits: Which lengths are kept.
        locate: Index of a record → its file and line. It reads the source, so it is called only for messages.

    Raises:
        UserError: If an example is too long and `limits.overlong` is `error`.
    """
    store = prepared.store
    lengths = np.where(members[store.records], store.lengths, 0) if len(store) else store.lengths
    report = report_records(
        split, prepared.facts, store.marks, store.records, members, locate if prepared.moved else None
    )
    kept = apply_limits(store, lengths, limits, report, lambda example: locate(int(store.records[example])))
    files = prepared.facts["files"]
    content = [files[file]["xxh3_128"] for file in ("input_ids.bin", "loss_weights.bin", "lengths.bin")]
    return SplitExamples(name, store, kept, report, " ".join(content))


def report_records(
    split: str,
    facts: Mapping[str, Any],
    marks: npt.NDArray[np.uint32],
    records: Longs,
    members: Mask,
    locate: Callable[[int], str] | None = None,
) -> SourceReport:
    """Count what became of the records of a split when examples were made from them.

    Args:
        split: train, val or test.
        facts: The record log's facts, see `RecordLog.facts`.
        marks: What happened to each record, a bit for each of the log's codes, (records,).
        records: The record that each example was made from, (N,).
        members: Which records are in the split, (records,).
        locate: Index of a record → its file and line, if the places in `facts` are out of date.
    """
    report = SourceReport(split, facts["format"], records=int(members.sum()))
    counts = {
        code: int((((marks >> np.uint32(bit)) & np.uint32(1)).astype(bool) & members).sum())
        for bit, code in enumerate(facts["codes"])
    }
    report.rewritten_records = counts.pop(REWRITTEN, 0)
    if report.rewritten_records:
        rewritten = (marks >> np.uint32(facts["codes"].index(REWRITTEN))) & np.uint32(1)
        report.rewritten_examples = int((rewritten.astype(bool) & members)[records].sum())
    report.dropped = Counter({code: counts.pop(code) for code in facts["dropped"] if counts[code]})
    report.repairs = Counter({code: count for code, count in counts.items() if count})
    for reason, places in facts["dropped_at"].items():
        mine = [(index, place) for index, place in places if members[index]][:MAX_LOCATIONS]
        if mine:
            report.dropped_at[reason] = [place if locate is None else locate(index) for index, place in mine]
    return report


def apply_limits(
    examples: FlatExamples, lengths: Longs, limits: LengthLimits, report: SourceReport, locate: Callable[[int], str]
) -> Longs:
    """Return how many tokens of each example are kept, (N,), and write the counts into the report.

    Args:
        examples: N examples.
        lengths: Tokens of each, (N,); 0 for an example that is not in the split.
        limits: Which lengths are kept.
        report: Gets lengths, drops, cuts, examples and tokens.
        locate: Index of an example → file and line of its record.

    Raises:
        UserError: If an example is too long and `limits.overlong` is `error`.
    """
    report.set_lengths(lengths[lengths > 0])
    kept = _cut_or_drop(lengths, limits, report, locate)
    supervised = examples.supervise(first_tokens(np.arange(len(examples)), kept))
    _count_drops(report, "no_supervised_tokens", (kept > 0) & (supervised == 0))
    kept = np.where(supervised == 0, 0, kept)
    supervised = np.where(kept == 0, 0, supervised)
    report.examples = int((kept > 0).sum())
    report.tokens = int(kept.sum())
    report.supervised_tokens = int(supervised.sum())
    report.supervised_tokens_lost = int(examples.supervised[lengths > 0].sum() - supervised.sum())
    return kept


def _cut_or_drop(lengths: Longs, limits: LengthLimits, report: SourceReport, locate: Callable[[int], str]) -> Longs:
    """Return how many tokens of each example the limits leave, (N,)."""
    too_short = (lengths > 0) & (lengths < limits.min_length)
    _count_drops(report, "too_short", too_short)
    lengths = np.where(too_short, 0, lengths)
    overlong = lengths > limits.max_length
    if limits.cuts_examples or not overlong.any():
        return lengths
    if limits.overlong == "drop":
        _count_drops(report, "overlong", overlong)
        return np.where(overlong, 0, lengths)
    if limits.overlong == "truncate":
        report.truncated = int(overlong.sum())
        return np.minimum(lengths, limits.max_length)
    longest = int(lengths.argmax())
    raise UserError(
        f"{locate(longest)}: {lengths[longest]} tokens, but data.max_length is {limits.max_length}; "
        f"{int(overlong.sum())} of {int((lengths > 0).sum())} examples are longer. Set data.max_length to at least "
        f"{lengths[longest]}, or data.overlong to drop or truncate"
    )


def _count_drops(report: SourceReport, reason: str, dropped: npt.NDArray[np.bool_]) -> None:
    if dropped.any():
        report.dropped[reason] += int(dropped.sum())
