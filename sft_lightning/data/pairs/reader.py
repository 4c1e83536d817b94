"""Reads the splits of a preference run: an example of `SplitReader` is a pair here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from sft_lightning.data.pairs.store import PairStore, Shortening, pair_store
from sft_lightning.data.plan.split_examples import LengthLimits, SplitExamples
from sft_lightning.data.plan.split_reader import Sources, Split, SplitOptions, SplitReader
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.data.tokens.store_cache import Prepared


class PairReader(SplitReader):
    """Reads and tokenizes the splits of a preference run.

    Args:
        sources: Sources of each split; with `val_fraction`, those of training are the validation's too.
        options: How records are divided.
        builder: Makes two examples from each record.
        limits: Which lengths of pairs, both examples together, are kept.
        store_folder: Folder of token stores.
        shortening: How long pairs are shortened; `None` leaves that to `limits`.
    """

    def __init__(
        self,
        sources: Mapping[Split, Sources],
        options: SplitOptions,
        builder: ExampleBuilder,
        limits: LengthLimits,
        store_folder: Path,
        shortening: Shortening | None,
    ) -> None:
        super().__init__(sources, options, builder, limits, store_folder)
        self._shortening = shortening
        self._seen_as_pairs: dict[Path, tuple[Prepared, Prepared]] = {}

    def prepare(self, split: Split, name: str, *, rebuild: bool = False) -> Prepared:
        """Return the token store of a source as a store of pairs.

        Args:
            split: A split that has the source.
            name: The source's name.
            rebuild: Tokenize again what is stored already.
        """
        prepared = super().prepare(split, name, rebuild=rebuild)
        found = self._seen_as_pairs.get(prepared.folder)
        if found is None or found[0] is not prepared:
            found = prepared, replace(prepared, store=pair_store(prepared.store, self._shortening))
            self._seen_as_pairs[prepared.folder] = found
        return found[1]

    def _select(self, split: Split, name: str) -> SplitExamples:
        """Return the pairs that a split has of a source; what was cut before the limits is counted here."""
        part = super()._select(split, name)
        if self._shortening is None:
            return part
        store, report = cast("PairStore", part.store), part.report
        kept = part.indices
        report.set_lengths(store.whole_lengths[self._members(split, name)[store.records]])
        report.truncated = int((store.whole_lengths != store.lengths)[kept].sum())
        report.supervised_tokens_lost += int(store.lost[kept].sum())
        return replace(part, content=f"{part.content} {self._shortening}")
