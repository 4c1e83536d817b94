"""The first batch as it arrives: its documents are compared with their records, read again from the source files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import TemplateError

from sft_lightning.checks import Check
from sft_lightning.data.sources.source import read_records
from sft_lightning.data.templates.template import DocumentTemplate
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.data.tokens.record_log import RecordLog
from sft_lightning.training.checks.data.documents import BatchDocument, batch_documents
from sft_lightning.training.checks.data.expected_masks import ExpectedMask, expected_mask, wanted_weights
from sft_lightning.training.checks.data.stores import is_quick_to_read
from sft_lightning.training.checks.hooks import RunCheck
from sft_lightning.types import IGNORE_INDEX, Message, Record

if TYPE_CHECKING:
    from sft_lightning.data.datamodule import SFTDataModule
    from sft_lightning.training.module import CausalLMModule

_MAX_DOCUMENTS = 8
"""Documents of the first batch to compare."""

_MAX_RECORDS = 20_000
"""Records of a source to read for them: about half a second."""

_ROUNDING = 2.0**-8
"""Largest relative difference of a loss weight; `trainer.precision: bf16-true` makes it a bfloat16."""


class Rendered(NamedTuple):
    """A text that the template makes of a record."""

    messages: Sequence[Message]
    """The conversation."""

    text: str
    """The text."""

    half: int
    """0 for the record's only conversation, or the chosen one of a pair; 1 for the rejected one."""

    rewritten: bool
    """Whether the conversation has several texts."""


class Masks(RunCheck):
    """Compare the first batch of this process with its records."""

    def __init__(self) -> None:
        self._seen = False

    def on_train_batch_start(self, module: CausalLMModule, batch: Any, index: int) -> None:
        """Compare the first batch."""
        if not self._seen:
            self._seen = True
            epoch = module.trainer.current_epoch
            module.checks.run(lambda: check_batch(module.data, batch, epoch, index))


def check_batch(data: SFTDataModule, batch: Any, epoch: int, index: int) -> Check:
    """Check labels, loss weights, positions and padding of a batch.

    Args:
        data: The data of the run.
        batch: The batch as training gets it.
        epoch: Its epoch.
        index: Its number in the epoch, from 0.
    """
    if data.spec.streams:
        return _streamed(batch)
    plan, together = data.plan(epoch), data.layout.packing != "none"
    rows = [plan.row(row) for row in plan.micro_batch(index, data.rows.topology)]
    numbers = [row[:, 0].tolist() for row in rows]
    documents, padding = batch_documents(batch, numbers, halves=data.kind.documents_per_example, together=together)
    wrong = [fault for document in documents for fault in document.faults()]
    starts = {(number, half): start for row in rows for number, start, _ in row.tolist() for half in (0, 1)}
    compared, unknown = 0, Counter[str]()
    for document, record, format_name in _records(data, documents):
        found = compare(document, record, format_name, data.builder, starts[document.number, document.half])
        compared += found is None
        if found is not None and found.startswith("not compared: "):
            unknown[found.removeprefix("not compared: ")] += 1
        elif found is not None:
            wrong.append(f"{record.location}: {found}")
    return _outcome([*wrong, *padding], compared, len(documents), unknown)


def _outcome(wrong: Sequence[str], compared: int, total: int, unknown: Counter[str]) -> Check:
    if wrong:
        return Check("masks", False, wrong[0] + (f"; and {len(wrong) - 1} more" if len(wrong) > 1 else ""))
    figure = f"{compared} of {total} documents of the first batch compared with their records"
    reasons = "".join(f"; {count} not: {reason}" for reason, count in unknown.items())
    return Check("masks", True if compared else None, figure + reasons)


def _streamed(batch: Any) -> Check:
    rows = [[-1] * len(list(row)) for row in batch["document_lengths"]]
    documents, _ = batch_documents(batch, rows)
    wrong = [fault for document in documents for fault in document.faults()]
    if wrong:
        return Check("masks", False, wrong[0])
    return Check("masks", None, "streamed records are not read again; labels, weights and positions are consistent")


def _records(data: SFTDataModule, documents: Sequence[BatchDocument]) -> Iterator[tuple[BatchDocument, Record, str]]:
    """Yield the documents whose records come first in their files, with those records, read again.

    Yields:
        The document, its record, and the format of its source.
    """
    of: dict[tuple[str, int], list[BatchDocument]] = {}
    for document in documents:
        of.setdefault(data.blend.examples.record(document.number), []).append(document)
    nearest = sorted((key for key in of if key[1] < _MAX_RECORDS), key=lambda key: key[1])[:_MAX_DOCUMENTS]
    formats = {part.name: part.report.format for part in data.blend.examples.parts}
    for name, config in data.spec.sources_of("train").items():
        indices = {index for source, index in nearest if source == name}
        if not indices or not is_quick_to_read(name, config):
            continue
        for index, record in enumerate(read_records(name, config)):
            if index in indices:
                yield from ((document, record, formats[name]) for document in of[name, index])
            if index >= max(indices):
                break


def compare(
    document: BatchDocument, record: Record, format_name: str, builder: ExampleBuilder, start: int
) -> str | None:
    """Return what is wrong with a document, given its record; `None` if nothing is.

    Args:
        document: The document, as training gets it.
        record: The record that it was made from.
        format_name: The record's format.
        builder: Has template, tokenizer and `loss_on` of the run.
        start: Its first token in its example, by the plan.

    Returns:
        The first difference, or `not compared: ` and the reason if it cannot be known.
    """
    found = [each for each in rendered_texts(record, format_name, builder) if each.half == document.half]
    aligned = False
    for each in found:
        template = builder.template_for(each.messages)
        mask = expected_mask(
            each.text, each.messages, template, builder.tokenizer, builder.loss_on, rewritten=each.rewritten
        )
        if mask is None:
            continue
        aligned = True
        first = position_in(mask.ids, document.ids.tolist(), start)
        if first is not None:
            begins = _beginning(document, each.messages, builder) if first == 0 else None
            return begins or difference(document, mask, first, builder)
    if not aligned:
        return "not compared: the template changes contents"
    if not _is_built(document, record, format_name, builder):
        return "its token ids are not those of its record"
    if start or document.half or len(found) > 1 or builder.loss_on == "all":
        return "not compared: its text is cut before an answer"
    messages = found[0].messages
    return _beginning(document, messages, builder) or _up_to_first_answer(document, messages, builder)


def rendered_texts(record: Record, format_name: str, builder: ExampleBuilder) -> Iterator[Rendered]:
    """Yield the texts that the template makes of a record.

    Args:
        record: The record.
        format_name: Its format.
        builder: Has the template of the run.
    """
    for half, messages in enumerate(builder.messages_of(record, format_name).values()):
        examples = builder.render(record, messages)
        for segments in examples:
            yield Rendered(messages, "".join(segment.text for segment in segments), half, len(examples) > 1)


def position_in(ids: Sequence[int], part: Sequence[int], likely: int) -> int | None:
    """Return where a part of an example begins: where it should, or else the first place that fits.

    Args:
        ids: Token ids of the example.
        part: Token ids of the part; the prompt of a pair may have lost its beginning, an answer its end.
        likely: Where the plan says that it begins.
    """
    places = [likely, *range(len(ids) - len(part) + 1)]
    return next((place for place in places if ids[place : place + len(part)] == part), None)


def difference(document: BatchDocument, mask: ExpectedMask, first: int, builder: ExampleBuilder) -> str | None:
    """Return the first token whose loss weight is not the expected one; `None` if there is none.

    Args:
        document: The document.
        mask: The tokens of its whole example.
        first: Where the document begins in it.
        builder: Has the tokenizer, for the message.
    """
    actual = np.where(document.labels == IGNORE_INDEX, 0.0, document.weights.astype(np.float64))
    expected = mask.weights[first : first + len(actual)].copy()
    expected[0] = 0.0  # no token of the document predicts it
    wrong = np.flatnonzero(~np.isnan(expected) & (np.abs(actual - expected) > _ROUNDING * expected))
    if not len(wrong):
        return None
    at = int(wrong[0])
    token = builder.tokenizer.convert_ids_to_tokens([int(document.ids[at])])[0]
    return f"token {at} ({token!r}) has loss weight {actual[at]:g}, but its message has {expected[at]:g}"


def _beginning(document: BatchDocument, messages: Sequence[Message], builder: ExampleBuilder) -> str | None:
    """Return what is wrong with the beginning of an example: it has one BOS if prompts are served with one, else none.

    Args:
        document: The document, from the beginning of its example.
        messages: The conversation.
        builder: Has tokenizer and template.
    """
    tokenizer = builder.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None or messages[0].content.lstrip().startswith(str(tokenizer.bos_token)):
        return None
    if isinstance(builder.template_for(messages), DocumentTemplate):
        served = tokenizer("question").input_ids
    else:
        try:
            question = [{"role": "user", "content": "question"}]
            text = str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True))
        except TemplateError:  # a template may demand more of a conversation
            return None
        served = tokenizer(text, add_special_tokens=False).input_ids
    wanted, found = (
        next((n for n, each in enumerate(ids) if each != bos), len(ids)) for ids in (served, document.ids.tolist())
    )
    return None if found == min(wanted, 1) else f"it begins with {found} BOS tokens, but prompts with {wanted}"


def _up_to_first_answer(document: BatchDocument, messages: Sequence[Message], builder: ExampleBuilder) -> str | None:
    """Return what is wrong with a document whose text was cut before an answer, up to its first supervised answer.

    Args:
        document: The document, from the beginning of its example.
        messages: The conversation.
        builder: Has tokenizer and template, to serve the prompt.
    """
    weights = wanted_weights(messages, builder.loss_on)
    answer = next((n for n, each in enumerate(messages) if weights[n] and each.role == "assistant"), 0)
    if not answer or any(weights[:answer]):
        return "not compared: its text is cut before an answer"
    prompt = builder.template_for(messages).generation_prompt(messages[:answer])
    served = builder.tokenizer(prompt, add_special_tokens=False).input_ids
    if document.ids[: len(served)].tolist() != served[: len(document.ids)]:
        return "its prompt has other token ids than the prompt that is served"
    labelled = document.labels[: len(served) + 1] != IGNORE_INDEX
    if labelled[: len(served)].any():
        return f"token {int(labelled.argmax())} of its prompt has a label"
    return "the first token of its answer has no label" if not labelled[len(served) :].all() else None


def _is_built(document: BatchDocument, record: Record, format_name: str, builder: ExampleBuilder) -> bool:
    """Whether the record, tokenized again as training does, has the document's tokens."""
    examples = [each for batch, _ in builder.build([record], format_name, "", RecordLog()) for each in batch]
    return any(position_in(each.input_ids.tolist(), document.ids.tolist(), 0) is not None for each in examples)
