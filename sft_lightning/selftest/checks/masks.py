"""Whether the tokens with a loss are the text that is to be learned, and prompts are served as they are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.formats.registry import Malformed
from sft_lightning.data.sources.source import SourceConfig, read_records
from sft_lightning.data.tokens.example_checks import check_examples
from sft_lightning.data.tokens.examples import ALWAYS_DROPPED
from sft_lightning.data.tokens.fast_encoder import TextEncoder
from sft_lightning.data.tokens.tokenization import tokenize
from sft_lightning.errors import UserError
from sft_lightning.selftest.checks import Check
from sft_lightning.types import Message, Record, Segment
from sft_lightning.views.highlight import show_tokens

Conversation = tuple[Record, Sequence[Message]]


def check_masks(data: SFTDataModule, num_records: int) -> Iterator[Check]:
    """Check the first records of every training and validation source.

    Args:
        data: The data of the run.
        num_records: Records of each source.

    Raises:
        UserError: If a source cannot be read, or a record is wrong and `data.malformed` is `error`.
    """
    for sources in (data.spec.sources_of("train"), data.spec.sources_of("val")):
        for name, config in sources.items():
            conversations = read_conversations(data, name, config, num_records)
            yield _supervised_text(data, name, conversations)
            yield _served_prompts(data, name, conversations)


def read_conversations(data: SFTDataModule, name: str, config: SourceConfig, num_records: int) -> list[Conversation]:
    """Return the conversations of a source's first records that make an example, with their records.

    Args:
        data: The data of the run.
        name: The source's name.
        config: The source.
        num_records: Records to read.

    Raises:
        UserError: If the source cannot be read, or a record is wrong and `data.malformed` is `error`.
    """
    limit = min(num_records, config.max_examples or num_records)
    conversations: list[Conversation] = []
    found = ""
    for record in islice(read_records(name, replace(config, max_examples=limit)), limit):
        found = found or data.builder.format_of(record, config.format, config.path)
        try:
            made = data.builder.conversations(record, found)
        except Malformed as error:
            if data.builder.malformed == "error" and error.reason not in ALWAYS_DROPPED:
                raise
            continue
        conversations += [(record, messages) for messages in made.values()]
    return conversations


def _supervised_text(data: SFTDataModule, name: str, conversations: Sequence[Conversation]) -> Check:
    encoder = TextEncoder(data.tokenizer)
    num_examples = num_supervised = 0
    wrong: list[str] = []
    for record, messages in conversations:
        rendered = data.builder.render(record, messages)
        for segments, example in zip(rendered, tokenize(rendered, encoder), strict=True):
            shown = show_tokens(example, data.tokenizer)
            runs = groupby(shown, key=lambda token: token.weight > 0)
            decoded = ["".join(token.text for token in run) for supervised, run in runs if supervised]
            difference = first_difference(supervised_texts(segments), decoded)
            if difference is not None:
                wrong.append(f"{record.location}: {difference}")
            num_examples += 1
            num_supervised += sum(token.weight > 0 for token in shown)
    figure = f"{num_examples} examples: {num_supervised:,} supervised tokens"
    if wrong:
        return Check(f"masks of {name}", False, f"{figure}; {len(wrong)} examples differ; {wrong[0]}")
    return Check(f"masks of {name}", num_supervised > 0, f"{figure}, which decode to the supervised text")


def supervised_texts(segments: Sequence[Segment]) -> list[str]:
    """Return the supervised texts of an example, segments that follow each other joined."""
    runs = groupby(segments, key=lambda segment: segment.supervised and segment.weight > 0)
    texts = ["".join(segment.text for segment in run) for supervised, run in runs if supervised]
    return [text for text in texts if text]


def first_difference(expected: Sequence[str], found: Sequence[str]) -> str | None:
    """Return what the first difference between two lists of texts is; `None` if there is none."""
    for n, (want, have) in enumerate(zip(expected, found, strict=False), start=1):
        if want != have:
            return f"supervised text {n} is {want[-60:]!r}, its tokens say {have[-60:]!r}"
    if len(expected) != len(found):
        return f"{len(expected)} supervised texts, but {len(found)} runs of supervised tokens"
    return None


def _served_prompts(data: SFTDataModule, name: str, conversations: Sequence[Conversation]) -> Check:
    encoder = TextEncoder(data.tokenizer)
    try:
        for record, messages in conversations:
            template = data.builder.template_for(messages)
            check_examples(template, data.tokenizer, encoder, [(record.location, messages)], data.spec.loss_on)
    except UserError as error:
        return Check(f"prompts of {name}", False, str(error))
    figure = f"{len(conversations)} records: stop tokens supervised, prompts served as they are trained"
    return Check(f"prompts of {name}", bool(conversations), figure)
