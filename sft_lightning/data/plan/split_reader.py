"""Reads the splits of a run: their sources, the records that each has, and the tokenized examples."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from sft_lightning.data.formats.deepspeed_chat import is_divided
from sft_lightning.data.plan.split_examples import WAYS_TO_KEEP_EXAMPLES, LengthLimits, SplitExamples, select_examples
from sft_lightning.data.plan.splits import (
    Compat,
    Mask,
    check_part,
    deepspeed_chat_part,
    hold_out,
    stage_records,
)
from sft_lightning.data.sources.source import SourceConfig, read_record, read_records
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.data.tokens.store_cache import Prepared, prepare_source
from sft_lightning.errors import UserError
from sft_lightning.types import Longs, Record

Split = Literal["train", "val", "test", "predict"]

Sources = Mapping[str, SourceConfig]
"""Sources by their names in the YAML."""


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How the records of each source are divided among splits and training stages.

    Raises:
        UserError: If `val_fraction` is out of range.
    """

    val_fraction: float = 0.0
    """Share of each training source to hold out for validation."""

    data_split: str | None = None
    """Proportions of the training stages that share the data, such as `2,4,4`."""

    data_split_part: int = 0
    """The stage that this run trains, from 0."""

    compat: Compat | None = None
    """Another system's rule to divide by, instead of ours."""

    seed: int = 0
    """Seed of the run."""

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
        builder: Makes examples from records.
        limits: Which lengths are kept.
        store_folder: Folder of token stores.
    """

    def __init__(
        self,
        sources: Mapping[Split, Sources],
        options: SplitOptions,
        builder: ExampleBuilder,
        limits: LengthLimits,
        store_folder: Path,
    ) -> None:
        self.builder = builder
        self.read: dict[Split, list[SplitExamples]] = {}
        """The examples of the splits that were asked for so far, source by source."""
        self._options = options
        self._limits = limits
        self._store_folder = store_folder
        self._prepared: dict[int, Prepared] = {}
        self._sources: dict[Split, Sources] = dict(sources)
        if options.val_fraction:
            self._sources["val"] = sources["train"]

    def sources(self, split: Split) -> Sources:
        """Return the sources of a split; those of training are divided with `val_fraction`."""
        return self._sources.get(split, {})

    def examples(self, split: Split) -> list[SplitExamples]:
        """Return the examples of a split, source by source; read and tokenized the first time.

        Raises:
            UserError: If the split has no source, a record is wrong, or an example is too long.
        """
        if not self.sources(split):
            raise UserError(_NO_SOURCES[split])
        if split not in self.read:
            self.read[split] = [self._select(split, name) for name in self.sources(split)]
        return self.read[split]

    def check_left(self, split: Split) -> None:
        """Check that a split that was read has examples.

        Raises:
            UserError: If no training source, or not every evaluation source, has one.
        """
        parts = self.read[split]
        dropped = {part.name: dict(part.report.dropped) for part in parts}
        if split == "train" and not any(part.report.examples for part in parts):
            raise UserError(
                f"data.sources: no example is left to train on; dropped: {dropped}; {WAYS_TO_KEEP_EXAMPLES}"
            )
        for part in parts:
            if split != "train" and not part.report.examples:
                raise UserError(
                    f"data: no example of the {split} source {part.name!r} is left; dropped: {dropped[part.name]}; "
                    f"{WAYS_TO_KEEP_EXAMPLES}"
                )

    def _select(self, split: Split, name: str) -> SplitExamples:
        """Return the examples that a split has of a source."""
        prepared, members = self.prepare(split, name), self._members(split, name)
        locate = functools.partial(_locate, name, self.sources(split)[name])
        return select_examples(name, split, prepared, members, self._limits, locate)

    def prepare(self, split: Split, name: str, *, rebuild: bool = False) -> Prepared:
        """Return the token store of a source; opened once, also where two splits share it.

        Args:
            split: A split that has the source.
            name: The source's name.
            rebuild: Tokenize again what is stored already.
        """
        config = self.sources(split)[name]
        if rebuild or id(config) not in self._prepared:
            self._prepared[id(config)] = prepare_source(name, config, self.builder, self._store_folder, rebuild=rebuild)
        return self._prepared[id(config)]

    def prepare_all(self, *, rebuild: bool = False) -> dict[str, Prepared]:
        """Return the token store of every source that has one, by split and name: `train/alpaca`.

        Args:
            rebuild: Tokenize again what is stored already.
        """
        splits: list[Split] = ["train", "val", "test"]
        if self._options.val_fraction:
            splits.remove("val")  # held out of the training sources
        return {
            f"{split}/{name}": self.prepare(split, name, rebuild=rebuild)
            for split in splits
            if not any(config.streaming for config in self.sources(split).values())
            for name in self.sources(split)
        }

    def records(self, split: Split, name: str, limit: int | None = None) -> Iterator[Record]:
        """Yield the records that a split has of a source, in file order.

        Args:
            split: The split.
            name: The source's name.
            limit: Records at most; `None`: all.
        """
        records = read_records(name, self.sources(split)[name])
        if self._divides(split, name):
            members = self._members(split, name)
            records = (record for index, record in enumerate(records) if members[index])
        return islice(records, limit)

    def _divides(self, split: Split, name: str) -> bool:
        """Whether a split has only a part of a source's records."""
        options, config = self._options, self.sources(split)[name]
        in_stages = options.data_split is not None and not config.sft_only
        by_deepspeed_chat = options.compat == "deepspeed_chat"
        if by_deepspeed_chat and split in ("train", "val") and is_divided(config.path, config.format):
            return True
        if split == "val" and not options.val_fraction:
            return in_stages and by_deepspeed_chat
        return split in ("train", "val") and (in_stages or options.val_fraction > 0)

    def _members(self, split: Split, name: str) -> Mask:
        """Return which records of a source a split has, (records,)."""
        members = np.ones(self.prepare(split, name).num_records, bool)
        if not self._divides(split, name):
            return members
        options = self._options
        members[:] = False
        members[self._stage(split, name, len(members))] = True
        if options.val_fraction and split in ("train", "val"):
            number = list(self.sources(split)).index(name)
            training, held_out = hold_out(members, options.val_fraction, seed=(options.seed, number))
            return held_out if split == "val" else training
        return members

    def _stage(self, split: Split, name: str, num_records: int) -> Longs:
        """Return the records of a source that this training stage has of a split, as indices."""
        options, config = self._options, self.sources(split)[name]
        records = np.arange(num_records)
        if options.compat == "deepspeed_chat" and is_divided(config.path, config.format):
            evaluates = split == "val" and not options.val_fraction
            records = records[deepspeed_chat_part(num_records, evaluation=evaluates, seed=options.seed)]
        if options.data_split is None or config.sft_only:
            return records
        stage = stage_records(
            len(records), options.data_split, options.data_split_part, seed=options.seed, compat=options.compat
        )
        return records[stage]


_NO_SOURCES: Mapping[Split, str] = {
    "train": "data.sources: no source given, so there is nothing to train on",
    "val": "data: set val_sources or val_fraction; there is nothing to validate on",
    "test": "data.test_sources: no source given, so there is nothing to test on",
}


def _locate(name: str, config: SourceConfig, index: int) -> str:
    return read_record(name, config, index).location
