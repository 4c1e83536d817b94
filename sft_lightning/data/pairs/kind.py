"""The kind of examples of a preference run: pairs of a chosen and a rejected conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import xxhash
from transformers import PreTrainedTokenizerFast

from sft_lightning.batch import Batch
from sft_lightning.data.batches.loader import Document, EvaluationLoader
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.pairs.collate import PairBatch, collate_pairs
from sft_lightning.data.pairs.examples import PairBuilder
from sft_lightning.data.pairs.reader import PairReader
from sft_lightning.data.pairs.spec import PairDataSpec
from sft_lightning.data.pairs.store import PairExample
from sft_lightning.data.plan.epoch_plan import Layout
from sft_lightning.data.plan.split_examples import SplitExamples
from sft_lightning.data.plan.split_reader import Split
from sft_lightning.data.templates.template import Template
from sft_lightning.data.tokens.examples import ExampleBuilder


@dataclass(frozen=True)
class Pairs:
    """A pair of conversations is an example, and two documents of a row."""

    spec: PairDataSpec
    """The YAML's keys under `data`."""

    documents_per_example: int = 2
    """Documents of a row that an example is."""

    def make_builder(self, tokenizer: PreTrainedTokenizerFast, template: Template) -> PairBuilder:
        """Return what makes two examples from each record.

        Args:
            tokenizer: The run's tokenizer.
            template: The run's template.
        """
        spec = self.spec
        return PairBuilder(
            tokenizer=tokenizer,
            template=template,
            loss_on=spec.loss_on,
            malformed=spec.malformed,
            history=spec.pair_history,
        )

    def make_reader(self, builder: ExampleBuilder) -> PairReader:
        """Return what reads and tokenizes the splits; stores of pairs have their own folder."""
        spec = self.spec
        folder = spec.store_folder / f"pairs_{spec.pair_history}"
        return PairReader(spec.splits, spec.split_options, builder, spec.limits, folder, spec.shortening)

    def collate(
        self, rows: Sequence[Sequence[Document]], *, layout: Layout, pad_token_id: int, denominator: float
    ) -> PairBatch:
        """Return rows of pairs as one padded micro-batch.

        Args:
            rows: Pairs of each row, in order.
            layout: How documents share rows.
            pad_token_id: Id that fills the end of shorter rows.
            denominator: Weight of all pairs of the optimizer step.
        """
        return collate_pairs(
            [[(document.number, _pair_of(document)) for document in row] for row in rows],
            together=layout.packing != "none",
            pad_token_id=pad_token_id,
            denominator=denominator,
            share=layout.share_prompts,
            shape=layout.shape(self.spec.batch_size, self.spec.max_length),
        )

    def weights(self, batch: Batch) -> torch.Tensor:
        """Return the weights in a batch that the denominator of its step adds up: those of its pairs, (P,)."""
        return cast("PairBatch", batch)["pair_weights"]


def _pair_of(document: Document) -> PairExample:
    if not isinstance(document.tokens, PairExample):
        raise TypeError(f"expected a pair, found a {type(document.tokens).__name__}")
    return document.tokens


@dataclass(frozen=True)
class PairPart:
    """The pairs that a split has of one source."""

    split: Split
    """The split."""

    name: str
    """The source's name in the YAML."""

    content: str
    """A hash of the pairs' tokens, and of which pairs are in the split."""

    num_pairs: int
    """Pairs of the source, including those that are not in the split."""

    loader: EvaluationLoader
    """This rank's share of the pairs; they are numbered within the source."""


def pair_parts(data: SFTDataModule) -> list[PairPart]:
    """Return the pairs that were read so far, split by split and source by source."""
    return [
        PairPart(split, part.name, _content(part), len(part.kept), data.evaluation_loader(part))
        for split, parts in data.reader.read.items()
        for part in parts
    ]


def reference_folder(data: SFTDataModule) -> Path:
    """Return the folder of the reference model's log-probabilities: beside the token stores."""
    return data.spec.store_folder / "references"


def _content(part: SplitExamples) -> str:
    digest = xxhash.xxh3_128(part.content.encode())
    digest.update(np.ascontiguousarray(part.kept).data)
    return digest.hexdigest()
