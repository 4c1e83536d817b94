"""Records → generation prompts: what `predict` and samples ask the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from sft_lightning.data.examples import ExampleBuilder
from sft_lightning.data.formats.registry import Malformed, to_messages
from sft_lightning.data.sources import SourceConfig
from sft_lightning.types import Message, Record

PromptBatch = list[dict[str, str]]
"""Prompts to answer: `prompt`, `source`, `location` and, where the data has one, `reference`."""

_BEGINNING = 80
"""Characters of a document that it is continued from: what a reader takes in at a glance."""


def make_prompts(builder: ExampleBuilder, records: Iterable[Record], source: SourceConfig) -> Iterator[dict[str, str]]:
    """Yield a prompt for each record, ending where its last answer begins; that answer is its reference.

    Raises:
        UserError: If a record does not fit its format.
    """
    found = ""
    for record in records:
        found = found or builder.format_of(record, source.format, source.path)
        try:
            messages = to_messages(record, found, answered=False)
        except Malformed:
            if builder.malformed == "error":
                raise
            continue  # counted and reported where examples are made
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
