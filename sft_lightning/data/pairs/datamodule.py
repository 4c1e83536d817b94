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
from sft_lightning.data.pairs.examples import PairBuilder, PairHistory
from sft_lightning.data.pairs.reader import PairReader
from sft_lightning.data.pairs.store import PairExample, Shortening
from sft_lightning.data.plan.epoch_plan import EpochPlan
from sft_lightning.data.plan.split_examples import Corpus
from sft_lightning.data.plan.split_reader import Split
from sft_lightning.errors import UserError
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

    An example is a pair here: `max_length`, packing, blends and reports count both of its conversations together, which
    share a row. With `packing: none` each has a row of its own in the same micro-batch.

    Args:
        max_prompt_length: With `overlong: truncate`, tokens at the end of a prompt that are kept in any case. A pair is
            then shortened, as by Firefly, until each answer with its prompt has at most half of `data.max_length`.
        pair_history: What a rejected answer stands after: `own` (its conversation must have the chosen one's prompt) or
            `chosen` (the chosen one's earlier turns, whatever its own are; as by Firefly).

    Raises:
        UserError: If a key does not go with pairs.
    """

    def __init__(self, max_prompt_length: int | None = None, pair_history: PairHistory = "own", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task = "dpo"
        self.pair_history: PairHistory = pair_history
        self._check_keys()
        self.shortening = self._shortening(max_prompt_length)
        """How long pairs are shortened; `None`: not at all."""
        self.shares_prompts = False
        """Whether batches have the prompt of a pair once for both of its answers; for the model to say."""

    def _check_keys(self) -> None:
        if self.loss_on == "all":
            raise UserError("data.loss_on: all, but task: dpo compares answers; use assistant or last_turn")
        if self.limits.packing == "concat":
            raise UserError("data.packing: concat cuts examples, but a pair is compared whole; use best_fit or none")
        if self.streams:
            raise UserError(
                "data.sources: streamed sources are planned while training, but task: dpo needs its pairs ahead; leave "
                "out `streaming`"
            )

    def _shortening(self, max_prompt_length: int | None) -> Shortening | None:
        truncates = self.limits.overlong == "truncate"
        if max_prompt_length is None:
            if truncates:
                raise UserError(
                    "data.overlong: truncate, but of a pair the prompt is cut first, and data.max_prompt_length does "
                    "not say how much of it to keep; set it, or use drop"
                )
            return None
        if not truncates:
            raise UserError(
                f"data.max_prompt_length: {max_prompt_length}, but data.overlong: {self.limits.overlong} cuts nothing; "
                "set data.overlong: truncate, or leave max_prompt_length out"
            )
        share = self.limits.max_length // 2
        if not 1 <= max_prompt_length < share:
            raise UserError(
                f"data.max_prompt_length: must be at least 1 and below {share}, an answer's share of data.max_length "
                f"(half of {self.limits.max_length}), or nothing is left of long answers (got {max_prompt_length})"
            )
        return Shortening(share, max_prompt_length)

    @functools.cached_property
    def builder(self) -> PairBuilder:
        """What makes examples of records, two of each."""
        return PairBuilder(
            tokenizer=self.tokenizer,
            template=self.template,
            loss_on=self.loss_on,
            malformed=self.malformed,
            history=self.pair_history,
        )

    @functools.cached_property
    def reader(self) -> PairReader:
        """What reads and tokenizes the splits."""
        return PairReader(
            self.sources, self._other, self._split_options, self.builder, self.limits, self.store_dir, self.shortening
        )

    @property
    def packs(self) -> bool:
        """Whether rows hold more than one document; packed pairs always do."""
        return self.limits.packing != "none"

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
        return self.store_dir / "references"

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
                together=self.packs,
                pad_token_id=pad_token_id,
                denominator=denominator,
                share=self.shares_prompts,
            )

        return make


def _content(corpus: Corpus) -> str:
    digest = xxhash.xxh3_128(corpus.content.encode())
    digest.update(np.ascontiguousarray(corpus.kept).data)
    return digest.hexdigest()
