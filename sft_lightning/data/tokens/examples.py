"""Records of a source → tokenized examples, batch by batch."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.formats.fields import Malformed
from sft_lightning.data.formats.registry import find_format, to_messages
from sft_lightning.data.templates.binding import special_tokens
from sft_lightning.data.templates.template import DocumentTemplate, Template
from sft_lightning.data.tokens.example_checks import check_examples
from sft_lightning.data.tokens.fast_encoder import TextEncoder
from sft_lightning.data.tokens.record_log import REWRITTEN, RecordLog
from sft_lightning.data.tokens.tokenization import TokenizedBatch, Tokens, join, weigh
from sft_lightning.errors import UserError
from sft_lightning.types import Longs, LossOn, Message, Record, Segment

MalformedPolicy = Literal["error", "drop"]

ALWAYS_DROPPED = ("no_answer", "no_question", "same_answers")
"""Reasons for which a record is dropped whatever `data.malformed` says: it is well formed but teaches nothing."""

_EXAMPLES_AT_ONCE = 2048
_CHARACTERS_AT_ONCE = 1 << 22
_CONVERSATIONS_CHECKED = 32
"""Conversations of each source on which the template and the tokenizer are checked."""


class Conversation(NamedTuple):
    """A conversation of a record, rendered."""

    name: str
    """Which conversation of the record it is, `chosen` or `rejected`; empty for the only one."""

    messages: Sequence[Message]
    """Its messages."""

    examples: list[list[Segment]]
    """The segments of each example; several examples where the template rewrites earlier messages."""


class RenderedRecord(NamedTuple):
    """A record with its conversations, or with the reason why it is dropped."""

    record: Record
    """The record."""

    format: str
    """The format of its source, configured or detected."""

    conversations: Sequence[Conversation]
    """Its conversations; none if it is dropped."""

    repairs: Sequence[str]
    """What was repaired, by code: `leading_answer`, `trailing_user`, `empty_turn`."""

    dropped: Malformed | None
    """Why the record is dropped; `None` if it is not."""


IndexedSegments = tuple[int, list[Segment]]
"""Index of a record, and the segments of one of its examples."""


@dataclass(frozen=True, kw_only=True)
class ExampleBuilder:
    """Turns records into examples, the same way for every source."""

    tokenizer: PreTrainedTokenizerFast
    """The tokenizer, with `template` as its chat template."""

    template: Template
    """The template of conversations."""

    loss_on: LossOn
    """Which messages are supervised."""

    malformed: MalformedPolicy = "error"
    """Whether a record that does not fit its format stops the run or is dropped."""

    @functools.cached_property
    def _documents(self) -> DocumentTemplate:
        # Cached: finding out whether the tokenizer adds a BOS means tokenizing, and this is used for every record.
        return DocumentTemplate(special_tokens(self.tokenizer))

    @functools.cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer)

    @functools.cached_property
    def tokenizer_checksum(self) -> str:
        """A hash of the tokenizer with its special tokens; cached, because hashing a large vocabulary takes a while."""
        digest = xxhash.xxh3_128(self.tokenizer.backend_tokenizer.to_str().encode())
        digest.update(json.dumps(self.tokenizer.special_tokens_map, default=str, sort_keys=True).encode())
        return digest.hexdigest()

    def format_of(self, record: Record, configured: str | None, path: str = "") -> str:
        """Return the format of a source: the configured one, else the one detected from its path or first record.

        Args:
            record: The source's first record.
            configured: The source's `format`.
            path: The source's `path`.

        Raises:
            UserError: If the format is unknown or cannot be detected, or if it is not text in pretraining.
        """
        if configured is None and isinstance(self.template, DocumentTemplate) and "text" in record.fields:
            return "text"
        name = find_format(configured, record, path)
        if isinstance(self.template, DocumentTemplate) and name != "text":
            raise UserError(
                f"data.sources.{record.source}: the format is {name}, but task: pretrain requires text; use task: sft, "
                "or data with a `text` key"
            )
        return name

    def template_for(self, messages: Sequence[Message]) -> Template:
        """Return the run's template, or the document template for plain documents."""
        return self._documents if messages[0].role == "text" else self.template

    def messages_of(
        self, record: Record, format_name: str, repairs: Counter[str] | None = None
    ) -> dict[str, Sequence[Message]]:
        """Return the conversations of a record by name; a record's only conversation has the empty name.

        Args:
            record: The record.
            format_name: The source's format, from `format_of`.
            repairs: Counts what was repaired in the record.

        Raises:
            Malformed: If the record makes no example.
        """
        return {"": to_messages(record, format_name, repairs=repairs)}

    def render(self, record: Record, messages: Sequence[Message]) -> list[list[Segment]]:
        """Return the segments of each example of a conversation.

        Args:
            record: The record that it comes from, for messages.
            messages: The conversation.

        Raises:
            UserError: If the template refuses the conversation.
        """
        try:
            return self.template_for(messages).render(messages, self.loss_on)
        except UserError as error:
            raise UserError(f"{record.location}: {error}") from error

    def render_records(
        self, records: Iterable[Record], configured_format: str | None, path: str
    ) -> Iterator[RenderedRecord]:
        """Render the records of a source, one after the other.

        Args:
            records: The records of the source.
            configured_format: The source's `format`.
            path: The source's `path`.

        Raises:
            UserError: If a record is malformed and not dropped, or the template refuses it.
        """
        name = ""
        repairs: Counter[str] = Counter()
        for record in records:
            name = name or self.format_of(record, configured_format, path)
            repairs.clear()
            try:
                conversations = [
                    Conversation(which, messages, self.render(record, messages))
                    for which, messages in self.messages_of(record, name, repairs).items()
                ]
            except Malformed as error:
                if self.malformed == "error" and error.reason not in ALWAYS_DROPPED:
                    raise
                yield RenderedRecord(record, name, (), (), error)
            else:
                yield RenderedRecord(record, name, conversations, tuple(repairs), None)

    def build(
        self, records: Iterable[Record], configured_format: str | None, path: str, log: RecordLog
    ) -> Iterator[tuple[TokenizedBatch, Longs]]:
        """Tokenize a source batch by batch; while one batch is tokenized, the next is read and rendered.

        Args:
            records: The records of the source.
            configured_format: The source's `format`.
            path: The source's `path`.
            log: Filled with what happens to the records; a format that it already has is used.

        Yields:
            Examples, and the index of the record of each, (N,).

        Raises:
            UserError: If a record is malformed and not dropped, or the template or tokenizer fails a check.
        """
        rendered = self.render_records(records, log.format or configured_format, path)
        with ThreadPoolExecutor(max_workers=1) as pool:
            pending: tuple[Future[Tokens], Sequence[IndexedSegments]] | None = None
            for batch in _batches(self._logged(rendered, log)):
                future = pool.submit(self._encoder.encode, join([segments for _, segments in batch]))
                if pending is not None:
                    yield self._finish(*pending)
                pending = future, batch
            if pending is not None:
                yield self._finish(*pending)

    def _finish(self, tokens: Future[Tokens], batch: Sequence[IndexedSegments]) -> tuple[TokenizedBatch, Longs]:
        examples = weigh([segments for _, segments in batch], tokens.result(), self._encoder)
        return examples, np.array([record for record, _ in batch], np.int64)

    def _logged(self, rendered: Iterable[RenderedRecord], log: RecordLog) -> Iterator[IndexedSegments]:
        """Yield the segments of every example, check the first conversations, and log what happened to the records."""
        first: list[tuple[str, Sequence[Message]]] = []
        checked = False
        for index, each in enumerate(rendered):
            log.format = each.format
            log.marks.append(0)
            if each.dropped is not None:
                log.drop(each.dropped.reason, each.record.location)
            for repair in each.repairs:
                log.mark(repair)
            if not checked:
                first += [(each.record.location, conversation.messages) for conversation in each.conversations]
                checked = self._check(first, at_least=_CONVERSATIONS_CHECKED)
            for conversation in each.conversations:
                if len(conversation.examples) > 1:
                    log.mark(REWRITTEN)
                for segments in conversation.examples:
                    yield index, segments
        if not checked:
            self._check(first, at_least=1)

    def _check(self, conversations: Sequence[tuple[str, Sequence[Message]]], *, at_least: int) -> bool:
        """Check template and tokenizer on the first conversations of a source, once there are so many."""
        if len(conversations) < at_least:
            return False
        template = self.template_for(conversations[0][1])
        check_examples(template, self.tokenizer, self._encoder, conversations, self.loss_on)
        return True


def _batches(examples: Iterable[IndexedSegments]) -> Iterator[list[IndexedSegments]]:
    """Group examples: many enough to tokenize fast, few enough for memory."""
    batch: list[IndexedSegments] = []
    characters = 0
    for each in examples:
        batch.append(each)
        characters += sum([len(segment.text) for segment in each[1]])
        if len(batch) == _EXAMPLES_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
