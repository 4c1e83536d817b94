"""Check the masks of the first records of every source, and that prompts are tokenized as in serving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from sft_lightning.checks import Check
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import read_records
from sft_lightning.data.tokens.example_checks import check_examples
from sft_lightning.data.tokens.examples import RenderedRecord
from sft_lightning.data.tokens.fast_encoder import TextEncoder
from sft_lightning.data.tokens.tokenization import tokenize
from sft_lightning.errors import UserError
from sft_lightning.training.checks.data.documents import BatchDocument
from sft_lightning.training.checks.data.masks import compare
from sft_lightning.types import IGNORE_INDEX, TokenizedExample


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
            yield _masks(data, name, rendered)
            yield _served_prompts(data, name, rendered)


def _masks(data: SFTDataModule, name: str, records: Sequence[RenderedRecord]) -> Check:
    """Compare the examples of records with what a run compares its first batch with."""
    encoder = TextEncoder(data.tokenizer)
    num_examples = num_unknown = num_supervised = 0
    wrong: list[str] = []
    for each in records:
        for half, conversation in enumerate(each.conversations):
            for example in tokenize(conversation.examples, encoder):
                found = compare(document_of(example, half), each.record, each.format, data.builder, start=0)
                num_examples += 1
                num_supervised += int((example.loss_weights[1:] > 0).sum())
                if found is not None and found.startswith("not compared: "):
                    num_unknown += 1
                elif found is not None:
                    wrong.append(f"{each.record.location}: {found}")
    figure = f"{num_examples} examples: {num_supervised:,} supervised tokens"
    if wrong:
        return Check(f"masks of {name}", False, f"{figure}; {len(wrong)} examples differ; {wrong[0]}")
    figure += ", which are those of the supervised messages"
    if num_unknown:
        figure += f"; {num_unknown} examples cannot be compared"
    return Check(f"masks of {name}", num_supervised > 0 if num_unknown < num_examples else None, figure)


def document_of(example: TokenizedExample, half: int = 0) -> BatchDocument:
    """Return an example as the document of a batch that it is alone.

    Args:
        example: The example.
        half: 1 for the rejected answer of a pair.
    """
    ids, weights = example.input_ids.astype(np.int64), example.loss_weights.copy()
    weights[:1] = 0.0
    labels = np.where(weights > 0, ids, IGNORE_INDEX)
    return BatchDocument(0, half, ids, labels, weights, np.arange(len(ids)))


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
