"""Check that the supervised tokens are the supervised text, and that prompts are tokenized as in serving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, islice

from sft_lightning.checks import Check
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import read_records
from sft_lightning.data.tokens.example_checks import check_examples
from sft_lightning.data.tokens.examples import RenderedRecord
from sft_lightning.data.tokens.fast_encoder import TextEncoder
from sft_lightning.data.tokens.tokenization import tokenize
from sft_lightning.errors import UserError
from sft_lightning.types import Segment
from sft_lightning.views.highlight import show_tokens


def check_masks(data: SFTDataModule, num_records: int) -> Iterator[Check]:
    """Check the first records of every training and validation source.

    Args:
        data: The data of the configuration.
        num_records: Number of records per source.

    Raises:
        UserError: If a source cannot be read, or if a record is malformed and `data.malformed` is `error`.
    """
    for sources in (data.spec.sources_of("train"), data.spec.sources_of("val")):
        for name, config in sources.items():
            records = islice(read_records(name, config), num_records)
            rendered = list(data.builder.render_records(records, config.format, config.path))
            yield _supervised_text(data, name, rendered)
            yield _served_prompts(data, name, rendered)


def _supervised_text(data: SFTDataModule, name: str, records: Sequence[RenderedRecord]) -> Check:
    encoder = TextEncoder(data.tokenizer)
    num_examples = num_supervised = 0
    wrong: list[str] = []
    for record, conversation in ((each.record, one) for each in records for one in each.conversations):
        for segments, example in zip(conversation.examples, tokenize(conversation.examples, encoder), strict=True):
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
    return Check(f"masks of {name}", num_supervised > 0, f"{figure}, which decode to exactly the supervised text")


def supervised_texts(segments: Sequence[Segment]) -> list[str]:
    """Return the supervised texts of an example; consecutive supervised segments are one text."""
    runs = groupby(segments, key=lambda segment: segment.supervised and segment.weight > 0)
    texts = ["".join(segment.text for segment in run) for supervised, run in runs if supervised]
    return [text for text in texts if text]


def first_difference(expected: Sequence[str], found: Sequence[str]) -> str | None:
    """Describe the first difference between two lists of texts; `None` if they are equal.

    Args:
        expected: Supervised texts of the template.
        found: Texts that the runs of supervised tokens decode to.
    """
    for n, (text, decoded) in enumerate(zip(expected, found, strict=False), start=1):
        if text != decoded:
            return f"supervised text {n} is {text[-60:]!r}, but its tokens decode to {decoded[-60:]!r}"
    if len(expected) != len(found):
        return f"{len(expected)} supervised texts, but {len(found)} runs of supervised tokens"
    return None


def _served_prompts(data: SFTDataModule, name: str, records: Sequence[RenderedRecord]) -> Check:
    encoder = TextEncoder(data.tokenizer)
    conversations = [(each.record.location, one.messages) for each in records for one in each.conversations]
    try:
        for location, messages in conversations:
            template = data.builder.template_for(messages)
            check_examples(template, data.tokenizer, encoder, [(location, messages)], data.spec.loss_on)
    except UserError as error:
        return Check(f"prompts of {name}", False, str(error))
    figure = f"{len(conversations)} records: stop tokens supervised, prompts tokenized as in serving"
    return Check(f"prompts of {name}", bool(conversations), figure)
