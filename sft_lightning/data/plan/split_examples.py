"""Token stores → the examples of a split: which records are in, how much of each example is kept, all counted."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash

from sft_lightning.data.plan.blending import BlendUnit
from sft_lightning.data.plan.splits import Mask
from sft_lightning.data.sources.report import MAX_LOCATIONS, SourceReport
from sft_lightning.data.tokens.record_log import REWRITTEN
from sft_lightning.data.tokens.store import TokenStore
from sft_lightning.data.tokens.store_cache import Prepared
from sft_lightning.errors import UserError
from sft_lightning.types import TokenizedExample

Longs = npt.NDArray[np.int64]

Overlong = Literal["error", "drop", "truncate"]


@dataclass(frozen=True, kw_only=True)
class LengthLimits:
    """Which lengths of examples are kept, and what is done with the others."""

    max_length: int
    """Tokens per row."""

    min_length: int = 0
    """Tokens below which an example is dropped."""

    overlong: Overlong = "error"
    """What to do with an example that is longer than a row."""

    cuts_examples: bool = False
    """Whether packing cuts examples (`concat`), so that none is too long."""


@dataclass(frozen=True)
class Corpus:
    """What a split has of one source."""

    name: str
    store: TokenStore
    kept: Longs
    """Tokens kept of each example of the store, (N,); 0 for one that is not in."""

    report: SourceReport

    content: str
    """Checksums of the tokens and weights."""

    @property
    def examples(self) -> Longs:
        """The examples that are in, as indices into the store."""
        return np.flatnonzero(self.kept)

    def amounts(self, unit: BlendUnit) -> npt.NDArray[np.float64]:
        """Return what each example that is in counts, in the blend's unit."""
        examples = self.examples
        if unit == "supervised_tokens":
            return self.store.supervise(whole(examples, self.kept[examples])).astype(np.float64)
        return self.kept[examples].astype(np.float64) if unit == "tokens" else np.ones(len(examples))


class Corpora:
    """Several corpora seen as one; examples are counted through all of them.

    Args:
        corpora: The corpora, in the order of the sources.
    """

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        self._corpora = corpora
        self.firsts = np.cumsum([0, *(len(corpus.kept) for corpus in corpora)])
        """Where each corpus starts, and the end of the last."""
        self.kept = np.concatenate([corpus.kept for corpus in corpora])
        """Tokens kept of each example, (N,)."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens and of how much of each example is kept."""
        digest = xxhash.xxh3_128()
        for corpus in self._corpora:
            digest.update(corpus.content.encode())
            digest.update(np.ascontiguousarray(corpus.kept).data)
        return digest.hexdigest()

    def example(self, index: int, start: int, stop: int) -> TokenizedExample:
        """Return tokens `start` to `stop` of an example."""
        number = self._number(index)
        return self._corpora[number].store.example(index - int(self.firsts[number]), start, stop)

    def record(self, index: int) -> tuple[str, int]:
        """Return the source of an example, and the index of the record that it was made of."""
        number = self._number(index)
        corpus = self._corpora[number]
        return corpus.name, int(corpus.store.records[index - int(self.firsts[number])])

    def _number(self, index: int) -> int:
        return int(np.searchsorted(self.firsts, index, side="right")) - 1

    def weigh(self, documents: Longs) -> npt.NDArray[np.float64]:
        """Return the loss weight that each document contributes, (D,); see `TokenStore.weigh`."""
        weights = np.zeros(len(documents))
        for corpus, first, end in zip(self._corpora, self.firsts[:-1], self.firsts[1:], strict=True):
            mine = (documents[:, 0] >= first) & (documents[:, 0] < end)
            weights[mine] = corpus.store.weigh(documents[mine] - [first, 0, 0])
        return weights


def whole(examples: Longs, lengths: Longs) -> Longs:
    """Return the documents that examples make from their first token to `lengths`, (len(examples), 3)."""
    return np.stack([examples, np.zeros_like(examples), lengths], axis=1)


def make_corpus(
    name: str, split: str, prepared: Prepared, members: Mask, limits: LengthLimits, locate: Callable[[int], str]
) -> Corpus:
    """Select a split's examples of a source, apply the limits, and count.

    Args:
        name: The source's name.
        split: train, val or test.
        prepared: The source, tokenized.
        members: Which records are in.
        limits: Which lengths are kept.
        locate: Index of a record → where it stands; reads the source, so called only where nothing else can say.

    Raises:
        UserError: If an example is too long and `limits.overlong` is `error`.
    """
    store = prepared.store
    lengths = np.where(members[store.records], store.lengths, 0) if len(store) else store.lengths
    report = _report_records(split, prepared, members, locate)
    report.set_lengths(lengths[lengths > 0])
    kept = _shorten(store, lengths, limits, report, locate)
    supervised = store.supervise(whole(np.arange(len(store)), kept))
    _count_drops(report, "no_supervised_tokens", (kept > 0) & (supervised == 0))
    kept = np.where(supervised == 0, 0, kept)
    supervised = np.where(kept == 0, 0, supervised)
    report.examples = int((kept > 0).sum())
    report.tokens = int(kept.sum())
    report.supervised_tokens = int(supervised.sum())
    report.supervised_tokens_lost = int(store.supervised[lengths > 0].sum() - supervised.sum())
    content = [
        prepared.facts["files"][file]["xxh3_128"] for file in ("input_ids.bin", "loss_weights.bin", "lengths.bin")
    ]
    return Corpus(name, store, kept, report, " ".join(content))


def _report_records(split: str, prepared: Prepared, members: Mask, locate: Callable[[int], str]) -> SourceReport:
    """Count what became of the records of a split when examples were made of them."""
    facts, marks = prepared.facts, prepared.store.marks
    report = SourceReport(split, facts["format"], records=int(members.sum()))
    counts = {
        code: int((((marks >> np.uint32(bit)) & np.uint32(1)).astype(bool) & members).sum())
        for bit, code in enumerate(facts["codes"])
    }
    report.rewritten_records = counts.pop(REWRITTEN, 0)
    if report.rewritten_records:
        rewritten = (marks >> np.uint32(facts["codes"].index(REWRITTEN))) & np.uint32(1)
        report.rewritten_examples = int((rewritten.astype(bool) & members)[prepared.store.records].sum())
    report.dropped = Counter({code: counts.pop(code) for code in facts["dropped"] if counts[code]})
    report.repairs = Counter({code: count for code, count in counts.items() if count})
    for reason, places in facts["dropped_at"].items():
        mine = [(index, place) for index, place in places if members[index]][:MAX_LOCATIONS]
        if mine:
            report.dropped_at[reason] = [locate(index) if prepared.moved else place for index, place in mine]
    return report


def _shorten(
    store: TokenStore, lengths: Longs, limits: LengthLimits, report: SourceReport, locate: Callable[[int], str]
) -> Longs:
    """Return how much of each example the limits leave."""
    too_short = (lengths > 0) & (lengths < limits.min_length)
    _count_drops(report, "too_short", too_short)
    lengths = np.where(too_short, 0, lengths)
    overlong = lengths > limits.max_length
    if limits.cuts_examples or not overlong.any():
        return lengths  # cut by the plan, and nothing is lost
    if limits.overlong == "drop":
        _count_drops(report, "overlong", overlong)
        return np.where(overlong, 0, lengths)
    if limits.overlong == "truncate":
        report.truncated = int(overlong.sum())
        return np.minimum(lengths, limits.max_length)
    longest = int(lengths.argmax())
    raise UserError(
        f"{locate(int(store.records[longest]))}: {lengths[longest]} tokens, but data.max_length is "
        f"{limits.max_length}; {int(overlong.sum())} of {int((lengths > 0).sum())} examples are longer. Set "
        f"data.max_length to at least {lengths[longest]}, or data.overlong to drop or truncate"
    )


def _count_drops(report: SourceReport, reason: str, dropped: npt.NDArray[np.bool_]) -> None:
    if dropped.any():
        report.dropped[reason] += int(dropped.sum())
