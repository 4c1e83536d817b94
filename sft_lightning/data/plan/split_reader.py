"""What each split of a run consists of: sources, the records of them that are in, and their tokenized examples."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from sft_lightning.data.plan.split_examples import Corpus, LengthLimits, make_corpus
from sft_lightning.data.plan.splits import Compat, Mask, check_part, hold_out, stage
from sft_lightning.data.sources.source import SourceConfig, read_record, read_records
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.data.tokens.store_cache import Prepared, prepare_source
from sft_lightning.errors import UserError
from sft_lightning.types import Record

Split = Literal["train", "val", "test", "predict"]

Sources = Mapping[str, SourceConfig]


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How records of a source are divided.

    Raises:
        UserError: If `val_fraction` is out of range.
    """

    val_fraction: float = 0.0
    """Share of each training source to hold out for validation."""

    data_split: str | None = None
    """Proportions of the stages of training that share the data, such as `2,4,4`."""

    data_split_part: int = 0
    """The stage that this run is, from 0."""

    compat: Compat | None = None
    """Whose rules to divide by instead of ours."""

    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"data.val_fraction: must be in [0, 1) (got {self.val_fraction})")
        if self.data_split is not None:
            check_part(self.data_split, self.data_split_part)
        elif self.data_split_part:
            raise UserError(f"data.data_split_part: {self.data_split_part}, but data.data_split is not set")


class SplitReader:
    """Reads and tokenizes the splits of a run.

    Args:
        sources: Sources of each split; with `val_fraction`, those of training are the validation's too.
        options: How records are divided.
        builder: What makes examples.
        limits: Which lengths are kept.
        store_dir: Folder of token stores.
    """

    def __init__(
        self,
        sources: Mapping[Split, Sources],
        options: SplitOptions,
        builder: ExampleBuilder,
        limits: LengthLimits,
        store_dir: Path,
    ) -> None:
        self._options = options
        self._builder = builder
        self._limits = limits
        self._store_dir = store_dir
        self._prepared: dict[int, Prepared] = {}
        self._sources: dict[Split, Sources] = dict(sources)
        if options.val_fraction:
            self._sources["val"] = sources["train"]

    def sources(self, split: Split) -> Sources:
        """Return the sources of a split; those of training are divided with `val_fraction`."""
        return self._sources.get(split, {})

    def corpora(self, split: Split) -> list[Corpus]:
        """Tokenize a split.

        Raises:
            UserError: If a record is wrong, an example too long, or a source has nothing to evaluate on.
        """
        corpora = []
        for name, config in self.sources(split).items():
            prepared, members = self.prepare(split, name), self._members(split, name)
            locate = functools.partial(_locate, name, config)
            corpora.append(make_corpus(name, split, prepared, members, self._limits, locate))
        for corpus in corpora:
            if split != "train" and not corpus.report.examples:
                raise UserError(
                    f"data: no example of the {split} source {corpus.name!r} is left: {dict(corpus.report.dropped)}"
                )
        return corpora

    def prepare(self, split: Split, name: str, *, rebuild: bool = False) -> Prepared:
        """Return the token store of a split's source; opened once, also where two splits share it."""
        config = self.sources(split)[name]
        if rebuild or id(config) not in self._prepared:
            self._prepared[id(config)] = prepare_source(name, config, self._builder, self._store_dir, rebuild=rebuild)
        return self._prepared[id(config)]

    def records(self, split: Split, name: str, limit: int | None = None) -> Iterator[Record]:
        """Read the records that a split has of a source, in file order."""
        records = read_records(name, self.sources(split)[name])
        if self._divides(split, name):
            members = self._members(split, name)
            records = (record for index, record in enumerate(records) if members[index])
        return islice(records, limit)

    def _divides(self, split: Split, name: str) -> bool:
        """Whether a split has only a part of a source's records."""
        options, config = self._options, self.sources(split)[name]
        staged = options.data_split is not None and not config.sft_only
        if split == "val" and not options.val_fraction:
            return staged and options.compat == "deepspeed_chat"
        return split in ("train", "val") and (staged or options.val_fraction > 0)

    def _members(self, split: Split, name: str) -> Mask:
        """Return which records of a source a split has."""
        members = np.ones(self.prepare(split, name).num_records, bool)
        if not self._divides(split, name):
            return members
        options, config = self._options, self.sources(split)[name]
        if options.data_split is not None and not config.sft_only:
            members[:] = False
            members[
                stage(
                    len(members), options.data_split, options.data_split_part, seed=options.seed, compat=options.compat
                )
            ] = True
        if options.val_fraction and split in ("train", "val"):
            number = list(self.sources(split)).index(name)
            sides = hold_out(members, options.val_fraction, seed=(options.seed, number))
            return sides[split == "val"]
        return members


def _locate(name: str, config: SourceConfig, index: int) -> str:
    return read_record(name, config, index).location
