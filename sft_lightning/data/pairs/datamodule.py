"""PairDataModule: the data of a preference run; `SFTDataModule` with pairs where that has examples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from sft_lightning.data.batches.loader import Collate, EvaluationLoader
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.pairs.collate import PairBatch, collate_pairs
from sft_lightning.data.pairs.examples import PairBuilder
from sft_lightning.data.pairs.reader import PairReader
from sft_lightning.data.pairs.spec import PairDataSpec
from sft_lightning.data.pairs.store import PairExample
from sft_lightning.data.plan.epoch_plan import EpochPlan
from sft_lightning.data.plan.split_examples import Corpus
from sft_lightning.data.plan.split_reader import Split
from sft_lightning.types import TokenizedExample


@dataclass(frozen=True)
class PairPart:
    """The pairs that a split has of a source."""

    split: Split
    name: str
    content: str
    """What they are: a hash of their tokens, and of which of them are in."""

    num_pairs: int
    """Pairs of the source, those included that are not in."""

    loader: EvaluationLoader
    """This rank's share of them, in the source's own numbering."""


class PairDataModule(SFTDataModule):
    """The data of a preference run: `task: dpo`.

    Args:
        spec: The YAML's keys under `data`.
    """

    spec: PairDataSpec

    @functools.cached_property
    def builder(self) -> PairBuilder:
        """What makes examples of records, two of each."""
        return PairBuilder(
            tokenizer=self.tokenizer,
            template=self.template,
            loss_on=self.spec.loss_on,
            malformed=self.spec.malformed,
            history=self.spec.pair_history,
        )

    @functools.cached_property
    def reader(self) -> PairReader:
        """What reads and tokenizes the splits."""
        return PairReader(
            self.spec.splits,
            self.spec.split_options,
            self.builder,
            self.spec.limits,
            self.spec.store_folder,
            self.spec.shortening,
        )

    @property
    def packs(self) -> bool:
        """Whether rows hold more than one document; packed pairs always do."""
        return self.layout.packing != "none"

    @property
    def splits(self) -> list[Split]:
        """The splits that were read so far."""
        return list(self._corpora)

    def parts(self) -> list[PairPart]:
        """Return what was read so far, split by split and source by source."""
        return [
            PairPart(split, corpus.name, _content(corpus), len(corpus.kept), self._evaluation_loader(corpus))
            for split, corpora in self._corpora.items()
            for corpus in corpora
        ]

    @property
    def reference_dir(self) -> Path:
        """Where log-probabilities of a reference model are kept: beside the token stores."""
        return self.spec.store_folder / "references"

    def _collate(self, example: Callable[[int, int, int], TokenizedExample]) -> Collate:
        pad_token_id = self.pad_token_id

        def pair(document: Sequence[int]) -> tuple[int, PairExample]:
            found = example(document[0], document[1], document[2])
            if not isinstance(found, PairExample):
                raise TypeError(f"expected a pair, found a {type(found).__name__}")
            return document[0], found

        def make(plan: EpochPlan, rows: Sequence[int], denominator: float) -> PairBatch:
            pairs = [[pair(document) for document in plan.row(row).tolist()] for row in rows]
            return collate_pairs(
                pairs,
                together=self.layout.packing != "none",
                pad_token_id=pad_token_id,
                denominator=denominator,
                share=self.layout.share_prompts,
            )

        return make


def _content(corpus: Corpus) -> str:
    digest = xxhash.xxh3_128(corpus.content.encode())
    digest.update(np.ascontiguousarray(corpus.kept).data)
    return digest.hexdigest()


def pair_data_from_keys(**keys: Any) -> PairDataModule:
    """The data of a preference run: `task: dpo`."""  # heads its keys in the help of the command line
    return PairDataModule(PairDataSpec(**keys))
