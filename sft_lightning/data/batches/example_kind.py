"""What an example is: a conversation, or a pair of answers. Everything else in the data path is the same for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerFast

from sft_lightning.batch import Batch
from sft_lightning.data.batches.collate import collate
from sft_lightning.data.batches.loader import Document
from sft_lightning.data.plan.epoch_plan import Layout
from sft_lightning.data.plan.split_reader import SplitReader
from sft_lightning.data.spec import DataSpec
from sft_lightning.data.templates.template import Template
from sft_lightning.data.tokens.examples import ExampleBuilder


class ExampleKind(Protocol):
    """How records become examples, and examples become batches."""

    @property
    def documents_per_example(self) -> int:
        """Documents of a row that an example is."""

    def make_builder(self, tokenizer: PreTrainedTokenizerFast, template: Template) -> ExampleBuilder:
        """Return what makes examples from records.

        Args:
            tokenizer: The run's tokenizer.
            template: The run's template.
        """

    def make_reader(self, builder: ExampleBuilder) -> SplitReader:
        """Return what reads and tokenizes the splits."""

    def collate(
        self, rows: Sequence[Sequence[Document]], *, layout: Layout, pad_token_id: int, denominator: float
    ) -> Batch:
        """Return rows as one padded micro-batch.

        Args:
            rows: Documents of each row, in order.
            layout: How documents share rows.
            pad_token_id: Id that fills the end of shorter rows.
            denominator: Supervised weight of the whole optimizer step.
        """

    def weights(self, batch: Batch) -> torch.Tensor:
        """Return the weights in a batch that the denominator of its step adds up."""


@dataclass(frozen=True)
class Conversations:
    """One conversation, or one plain document, is an example and a document of a row."""

    spec: DataSpec
    """The YAML's keys under `data`."""

    documents_per_example: int = 1
    """Documents of a row that an example is."""

    def make_builder(self, tokenizer: PreTrainedTokenizerFast, template: Template) -> ExampleBuilder:
        """Return what makes examples from records.

        Args:
            tokenizer: The run's tokenizer.
            template: The run's template.
        """
        spec = self.spec
        return ExampleBuilder(tokenizer=tokenizer, template=template, loss_on=spec.loss_on, malformed=spec.malformed)

    def make_reader(self, builder: ExampleBuilder) -> SplitReader:
        """Return what reads and tokenizes the splits."""
        spec = self.spec
        return SplitReader(spec.splits, spec.split_options, builder, spec.limits, spec.store_folder)

    def collate(
        self, rows: Sequence[Sequence[Document]], *, layout: Layout, pad_token_id: int, denominator: float
    ) -> Batch:
        """Return rows as one padded micro-batch.

        Args:
            rows: Documents of each row, in order.
            layout: How documents share rows.
            pad_token_id: Id that fills the end of shorter rows.
            denominator: Supervised weight of the whole optimizer step.
        """
        documents = [[document.tokens for document in row] for row in rows]
        shape = layout.shape(self.spec.batch_size, self.spec.max_length)
        return collate(documents, pad_token_id=pad_token_id, denominator=denominator, shape=shape)

    def weights(self, batch: Batch) -> torch.Tensor:
        """Return the weights in a batch that the denominator of its step adds up: those of its tokens, (B, S)."""
        return batch["loss_weights"]
