"""Records of one source → its tokenized examples, and how much of each is kept; everything counted."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.binding import check_serving, encoder, special_tokens
from sft_lightning.data.formats import find_format, to_messages
from sft_lightning.data.plan import Packing
from sft_lightning.data.report import SourceReport
from sft_lightning.data.store import TokenStore
from sft_lightning.data.templates import DocumentTemplate, Template
from sft_lightning.data.tokenization import tokenize
from sft_lightning.errors import UserError
from sft_lightning.types import LossOn, Message, Record, Segment, TokenizedExample

Overlong = Literal["error", "drop", "truncate"]

_TOKENIZE_AT_ONCE = 1000


@dataclass(frozen=True)
class Corpus:
    """One source, tokenized."""

    name: str
    store: TokenStore
    lengths: npt.NDArray[np.int64]
    """Tokens kept of each example, (N,); 0 for an example that was dropped."""

    report: SourceReport


@dataclass(frozen=True, kw_only=True)
class ExampleBuilder:
    """Makes examples of records, the same way for every source."""

    tokenizer: PreTrainedTokenizerFast
    template: Template
    loss_on: LossOn
    max_length: int
    overlong: Overlong
    packing: Packing

    @functools.cached_property
    def _documents(self) -> DocumentTemplate:
        # Made once: asking the tokenizer for its BOS means tokenizing, and there is a question for every record.
        return DocumentTemplate(special_tokens(self.tokenizer))

    def format_of(self, record: Record, configured: str | None) -> str:
        """Return the format of a source: as configured, else as its first record tells; documents in pretraining.

        Raises:
            UserError: If it cannot be told, or is not for this task.
        """
        pretraining = isinstance(self.template, DocumentTemplate)
        found = find_format(configured or ("text" if pretraining else None), record)
        if pretraining and found != "text":
            raise UserError(f"data.sources.{record.source}.format: {found} is for task: sft; pretraining takes text")
        return found

    def template_for(self, messages: Sequence[Message]) -> Template:
        """Return the run's template, or the one for documents, which use none."""
        return self._documents if messages[0].role == "text" else self.template

    def render(self, record: Record, messages: Sequence[Message]) -> list[list[Segment]]:
        """Return the segments of each example that a conversation makes."""
        try:
            return self.template_for(messages).render(messages, self.loss_on)
        except UserError as error:
            raise UserError(f"{record.location}: {error}") from error

    def build(self, name: str, split: str, records: Sequence[Record], format_name: str | None) -> Corpus:
        """Tokenize a source.

        Raises:
            UserError: If a record is wrong, or an example is too long and `overlong` is `error`.
        """
        report = SourceReport(split, self.format_of(records[0], format_name), records=len(records))
        segments: list[list[Segment]] = []
        owners: list[Record] = []
        served = False
        for record in records:
            messages = to_messages(record, report.format)
            if not served and all(message.context is None for message in messages):
                served = True
                check_serving(self.template_for(messages), self.tokenizer, messages[:-1] or messages)
            rendered = self.render(record, messages)
            segments += rendered
            owners += [record] * len(rendered)
        encode = encoder(self.tokenizer)
        examples: list[TokenizedExample] = []
        for start in range(0, len(segments), _TOKENIZE_AT_ONCE):
            examples += tokenize(segments[start : start + _TOKENIZE_AT_ONCE], encode)
        store = TokenStore.from_examples(examples)
        return Corpus(name, store, self._keep(store, owners, report), report)

    def _keep(self, store: TokenStore, owners: Sequence[Record], report: SourceReport) -> npt.NDArray[np.int64]:
        """Apply `overlong`, drop what teaches nothing, and count."""
        lengths = store.lengths
        overlong = (lengths > self.max_length) & (self.packing != "concat")
        kept = self._shorten(lengths, owners)
        supervised = store.supervised_tokens(kept)
        report.longest = int(lengths.max(initial=0))
        report.truncated = int(overlong.sum()) if self.overlong == "truncate" else 0
        if self.overlong == "drop" and overlong.any():
            report.dropped["overlong"] = int(overlong.sum())
        nothing_to_learn = (kept > 0) & (supervised == 0)
        if nothing_to_learn.any():
            report.dropped["no_supervised_tokens"] = int(nothing_to_learn.sum())
        kept = np.where(nothing_to_learn, 0, kept)
        report.examples = int((kept > 0).sum())
        report.tokens = int(kept.sum())
        report.supervised_tokens = int(supervised.sum())
        report.supervised_tokens_lost = int(store.supervised_tokens(lengths).sum() - supervised.sum())
        return kept

    def _shorten(self, lengths: npt.NDArray[np.int64], owners: Sequence[Record]) -> npt.NDArray[np.int64]:
        overlong = lengths > self.max_length
        if self.packing == "concat":
            return lengths  # cut by the plan, and nothing is lost
        if self.overlong == "drop":
            return np.where(overlong, 0, lengths)
        if self.overlong == "error" and overlong.any():
            longest = int(lengths.argmax())
            raise UserError(
                f"{owners[longest].location}: {lengths[longest]} tokens, but data.max_length is {self.max_length}; "
                f"{int(overlong.sum())} of {len(lengths)} examples are longer. Set data.max_length to at least "
                f"{lengths[longest]}, or data.overlong to drop or truncate"
            )
        return np.minimum(lengths, self.max_length)
