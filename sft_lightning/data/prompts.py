"""Records → generation prompts: what `predict` and samples ask the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sft_lightning.data.examples import ExampleBuilder
from sft_lightning.data.formats import to_messages
from sft_lightning.types import Message, Record

PromptBatch = list[dict[str, str]]
"""Prompts to answer: `prompt`, `source`, `location` and, where the data has one, `reference`."""

_BEGINNING = 80
"""Characters of a document that it is continued from: what a reader takes in at a glance."""


def make_prompts(builder: ExampleBuilder, records: Sequence[Record], format_name: str | None) -> PromptBatch:
    """Return a prompt for each record, ending where its last answer begins; that answer is its reference.

    Raises:
        UserError: If a record does not fit its format.
    """
    found = builder.format_of(records[0], format_name)
    return [_prompt(builder, record, to_messages(record, found, answered=False)) for record in records]


def _prompt(builder: ExampleBuilder, record: Record, messages: Sequence[Message]) -> dict[str, str]:
    prompt = {"source": record.source, "location": record.location}
    last = messages[-1]
    if last.role == "assistant" or (last.role == "text" and len(messages) > 1):
        prompt["reference"] = last.content
        messages = messages[:-1]
    elif last.role == "text":
        beginning = last.content[:_BEGINNING].rpartition(" ")[0] or last.content[:_BEGINNING]
        messages = [replace(last, content=beginning)]
    return {**prompt, "prompt": builder.template_for(messages).generation_prompt(messages)}
