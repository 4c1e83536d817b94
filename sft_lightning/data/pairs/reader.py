"""What each split of a preference run consists of: `SplitReader`, whose examples are pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from sft_lightning.data.pairs.examples import PairBuilder
from sft_lightning.data.pairs.store import PairStore, Shortening, pair_store
from sft_lightning.data.plan.split_examples import Corpus, LengthLimits
from sft_lightning.data.plan.split_reader import Sources, Split, SplitOptions, SplitReader
from sft_lightning.data.tokens.store_cache import Prepared


class PairReader(SplitReader):
    """Reads and tokenizes the splits of a preference run.

    Args:
        sources: Sources of each split; with `val_fraction`, those of training are the validation's too.
        options: How records are divided.
        builder: What makes examples.
        limits: Which lengths of pairs, both examples together, are kept.
        store_dir: Folder of token stores; those of pairs lie in a folder of it, for the same files make other examples.
        shortening: How long pairs are shortened; `None` leaves that to `limits`.
    """

    def __init__(
        self,
        sources: Mapping[Split, Sources],
        options: SplitOptions,
        builder: PairBuilder,
        limits: LengthLimits,
        store_dir: Path,
        shortening: Shortening | None,
    ) -> None:
        super().__init__(sources, options, builder, limits, store_dir / f"pairs_{builder.history}")
        self._shortening = shortening
        self._seen_as_pairs: dict[Path, tuple[Prepared, Prepared]] = {}

    def prepare(self, split: Split, name: str, *, rebuild: bool = False) -> Prepared:
        """Return the store of a split's source, of pairs."""
        prepared = super().prepare(split, name, rebuild=rebuild)
        found = self._seen_as_pairs.get(prepared.folder)
        if found is None or found[0] is not prepared:
            found = prepared, replace(prepared, store=pair_store(prepared.store, self._shortening))
            self._seen_as_pairs[prepared.folder] = found
        return found[1]

    def corpora(self, split: Split) -> list[Corpus]:
        """Tokenize a split; examples are pairs, in the report too.

        Raises:
            UserError: If a record is wrong, a pair too long, or a source has nothing to evaluate on.
        """
        return [self._count_shortened(split, corpus) for corpus in super().corpora(split)]

    def _count_shortened(self, split: Split, corpus: Corpus) -> Corpus:
        """Report what was cut before lengths were looked at, and let it tell the corpus from others."""
        if self._shortening is None:
            return corpus
        store, report = cast("PairStore", corpus.store), corpus.report
        kept = corpus.examples
        report.set_lengths(store.whole_lengths[self._members(split, corpus.name)[store.records]])
        report.truncated = int((store.whole_lengths != store.lengths)[kept].sum())
        report.supervised_tokens_lost += int(store.lost[kept].sum())
        return replace(corpus, content=f"{corpus.content} {self._shortening}")
