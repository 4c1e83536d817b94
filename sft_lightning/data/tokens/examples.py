"""Records of a source → tokenized examples, batch by batch; what becomes of every record is written down."""

from __future__ import annotations

import functools
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.formats.registry import Malformed, find_format, to_messages
from sft_lightning.data.templates.binding import special_tokens
from sft_lightning.data.templates.template import DocumentTemplate, Template
from sft_lightning.data.tokens.example_checks import check_examples
from sft_lightning.data.tokens.fast_encoder import TextEncoder
from sft_lightning.data.tokens.tokenization import Longs, TokenizedBatch, Tokens, join, weigh
from sft_lightning.errors import UserError
from sft_lightning.types import LossOn, Message, Record, Segment

MalformedPolicy = Literal["error", "drop"]

REWRITTEN = "rewritten"
"""Mark of a record that makes several examples, because the template rewrites earlier turns once others follow."""

_EXAMPLES_AT_ONCE = 2048
_CHARACTERS_AT_ONCE = 1 << 22
_CONVERSATIONS_CHECKED = 32
"""Conversations of each source to prove the template and the tokenizer on."""

_LOCATIONS_KEPT = 20
"""Places of dropped records to remember, for each reason."""

ALWAYS_DROPPED = ("no_answer", "no_question", "same_answers")
"""Reasons for which a record is left out whatever `data.malformed` says: it is well formed, but teaches nothing."""


@dataclass
class RecordLog:
    """What became of the records of a source while examples were made of them."""

    format: str = ""
    """The format that was given or found."""

    codes: list[str] = field(default_factory=list)
    """What may happen to a record, each a bit of `marks`: reasons for a drop, repairs, and `rewritten`."""

    marks: array[int] = field(default_factory=lambda: array("I"))
    """For each record read, the bits of what happened to it."""

    dropped: list[str] = field(default_factory=list)
    """The codes that mean that the record was left out."""

    dropped_at: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Index and place of the first records that were left out, by reason."""

    def mark(self, code: str) -> None:
        """Note that something happened to the last record."""
        if code not in self.codes:
            self.codes.append(code)
        self.marks[-1] |= 1 << self.codes.index(code)

    def drop(self, reason: str, location: str) -> None:
        """Note that the last record is left out."""
        self.mark(reason)
        if reason not in self.dropped:
            self.dropped.append(reason)
        places = self.dropped_at.setdefault(reason, [])
        if len(places) < _LOCATIONS_KEPT:
            places.append((len(self.marks) - 1, location))

    def facts(self) -> dict[str, Any]:
        """Return everything but the marks, for a store's manifest."""
        return {
            "format": self.format,
            "codes": self.codes,
            "dropped": self.dropped,
            "dropped_at": self.dropped_at,
        }


Rendered = tuple[int, list[Segment]]
"""Index of a record, and the segments of an example made of it."""


@dataclass(frozen=True, kw_only=True)
class ExampleBuilder:
    """Makes examples of records, the same way for every source."""

    tokenizer: PreTrainedTokenizerFast
    template: Template
    loss_on: LossOn
    malformed: MalformedPolicy = "error"

    @functools.cached_property
    def _documents(self) -> DocumentTemplate:
        # Made once: asking the tokenizer for its BOS means tokenizing, and there is a question for every record.
        return DocumentTemplate(special_tokens(self.tokenizer))

    @functools.cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer)

    @functools.cached_property
    def tokenizer_checksum(self) -> str:
        """A hash of the tokenizer, special tokens included; made once, because a large vocabulary takes a while."""
        digest = xxhash.xxh3_128(self.tokenizer.backend_tokenizer.to_str().encode())
        digest.update(json.dumps(self.tokenizer.special_tokens_map, default=str, sort_keys=True).encode())
        return digest.hexdigest()

    def format_of(self, record: Record, configured: str | None, path: str = "") -> str:
        """Return the format of a source: as configured, else as its path or first record tells.

        Raises:
            UserError: If that cannot be told, or conversations are to be pretrained on.
        """
        if configured is None and isinstance(self.template, DocumentTemplate) and "text" in record.fields:
            return "text"
        name = find_format(configured, record, path)
        if isinstance(self.template, DocumentTemplate) and name != "text":
            raise UserError(
                f"data.sources.{record.source}: the format is {name}, but pretraining takes text; use task: sft, or "
                "data with a `text` key"
            )
        return name

    def template_for(self, messages: Sequence[Message]) -> Template:
        """Return the run's template; plain documents have none."""
        return self._documents if messages[0].role == "text" else self.template

    def conversations(
        self, record: Record, format_name: str, repairs: Counter[str] | None = None
    ) -> dict[str, Sequence[Message]]:
        """Return the conversations that a record's examples are made of, by name; the only one of a record has none.

        Args:
            record: The row.
            format_name: The source's format, found.
            repairs: Counts what was repaired in the record.

        Raises:
            Malformed: If the record makes no example.
        """
        return {"": to_messages(record, format_name, repairs=repairs)}

    def render(self, record: Record, messages: Sequence[Message]) -> list[list[Segment]]:
        """Render a record's messages; the error of a template that refuses them names the record."""
        try:
            return self.template_for(messages).render(messages, self.loss_on)
        except UserError as error:
            raise UserError(f"{record.location}: {error}") from error

    def build(
        self, records: Iterable[Record], configured_format: str | None, path: str, log: RecordLog
    ) -> Iterator[tuple[TokenizedBatch, Longs]]:
        """Tokenize a source, batch by batch; the next batch is read and rendered while one is tokenized.

        Args:
            records: The source.
            configured_format: The source's `format`.
            path: The source's `path`.
            log: Filled with what becomes of the records.

        Yields:
            Examples, and the index of the record that each was made of.

        Raises:
            UserError: If a record is wrong, and `malformed` is `error`.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            pending: tuple[Future[Tokens], Sequence[Rendered]] | None = None
            for batch in _batches(self._render_all(records, configured_format, path, log)):
                future = pool.submit(self._encoder.encode, join([segments for _, segments in batch]))
                if pending is not None:
                    yield self._finish(*pending)
                pending = future, batch
            if pending is not None:
                yield self._finish(*pending)

    def _finish(self, tokens: Future[Tokens], batch: Sequence[Rendered]) -> tuple[TokenizedBatch, Longs]:
        examples = weigh([segments for _, segments in batch], tokens.result(), self._encoder)
        return examples, np.array([record for record, _ in batch], np.int64)

    def _render_all(
        self, records: Iterable[Record], configured_format: str | None, path: str, log: RecordLog
    ) -> Iterator[Rendered]:
        first: list[tuple[str, Sequence[Message]]] = []
        repairs: Counter[str] = Counter()
        for index, record in enumerate(records):
            if not log.format:
                log.format = self.format_of(record, configured_format, path)
            log.marks.append(0)
            try:
                messages = to_messages(record, log.format, repairs=repairs)
            except Malformed as error:
                if self.malformed == "error" and error.reason not in ALWAYS_DROPPED:
                    raise
                log.drop(error.reason, record.location)
                continue
            if repairs:
                for repair in repairs:
                    log.mark(repair)
                repairs.clear()
            rendered = self.render(record, messages)
            if len(first) < _CONVERSATIONS_CHECKED:
                first.append((record.location, messages))
                if len(first) == _CONVERSATIONS_CHECKED:
                    self._check(first)
            if len(rendered) > 1:
                log.mark(REWRITTEN)
            for segments in rendered:
                yield index, segments
        if 0 < len(first) < _CONVERSATIONS_CHECKED:
            self._check(first)

    def _check(self, conversations: Sequence[tuple[str, Sequence[Message]]]) -> None:
        """Prove on the first conversations of a source that template and tokenizer do what they promise."""
        template = self.template_for(conversations[0][1])
        check_examples(template, self.tokenizer, self._encoder, conversations, self.loss_on)


def _batches(rendered: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    """Group examples, as many as are worth tokenizing at once and no more than memory should hold."""
    batch: list[Rendered] = []
    characters = 0
    for each in rendered:
        batch.append(each)
        characters += sum([len(segment.text) for segment in each[1]])
        if len(batch) == _EXAMPLES_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def marks_of(log: RecordLog) -> npt.NDArray[np.uint32]:
    """Return a log's marks as an array, (records,)."""
    return np.array(log.marks, np.uint32)
