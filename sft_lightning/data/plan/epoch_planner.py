"""Tokenized sources → the plan of any epoch: what the weights ask for, and what the rows deliver."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import xxhash

from sft_lightning.data.plan.blending import BlendConfig, BlendUnit, choose, largest_deviation, passes
from sft_lightning.data.plan.epoch_plan import Choice, EpochPlan, Packing, plan_epoch, source_amounts
from sft_lightning.data.plan.split_examples import Corpora, Corpus
from sft_lightning.data.sources.report import DataReport
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.errors import UserError


class EpochPlanner:
    """Plans the epochs of a run.

    Args:
        corpora: What is trained on, in the order of the sources.
        sources: Configuration of each corpus's source.
        blend: What the sources' weights mean.
        packing: How examples share rows.
        max_length: Tokens per row.
        rows_per_step: The global batch.
        seed: Seed of the run.

    Raises:
        UserError: If a weight leaves a source without a single example.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        sources: Sequence[SourceConfig],
        *,
        blend: BlendConfig,
        packing: Packing,
        max_length: int,
        rows_per_step: int,
        seed: int,
    ) -> None:
        self.corpora = Corpora(corpora)
        self._corpora = corpora
        self._blend = blend
        self._packing: Packing = packing
        self._max_length = max_length
        self._rows_per_step = rows_per_step
        self._seed = seed
        self._amounts = [corpus.amounts(blend.by) for corpus in corpora]
        used = [i for i, amounts in enumerate(self._amounts) if len(amounts)]  # a source may have lost all it had
        found = passes(
            [float(self._amounts[i].sum()) for i in used],
            [sources[i].weight for i in used],
            [sources[i].max_epochs for i in used],
            blend,
        )
        self.passes = [0.0] * len(corpora)
        for i, times in zip(used, found, strict=True):
            self.passes[i] = times
            if not len(choose([self._amounts[i]], [times], seed=seed, epoch=0)[0]):
                raise UserError(
                    f"data.sources.{corpora[i].name}.weight: {sources[i].weight} of {len(self._amounts[i])} examples "
                    "is none; raise the weight, or leave the source out"
                )

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one planner a data module)
    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of an epoch."""
        return plan_epoch(
            self._choice(epoch),
            self.corpora.weigh,
            packing=self._packing,
            max_length=self._max_length,
            rows_per_step=self._rows_per_step,
            shuffle=(self._seed, epoch),
        )

    @property
    def repeats(self) -> bool:
        """Whether every epoch has the same examples, and so the same number of rows."""
        return all(times == int(times) for times in self.passes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens and of how much of each example is kept."""
        digest = xxhash.xxh3_128()
        for corpus in self._corpora:
            digest.update(corpus.content.encode())
            digest.update(np.ascontiguousarray(corpus.kept).data)
        return digest.hexdigest()

    def report(self, report: DataReport) -> None:
        """Write into a report what the first epoch's rows hold and which share of it each source has."""
        plan, unit = self.plan(0), self._unit
        tokens = int(plan.rows.lengths.sum())
        report.rows, report.optimizer_steps = plan.num_rows, plan.num_steps
        report.fill = tokens / max(1, plan.num_rows * self._max_length)
        report.blend_unit = unit
        amounts = source_amounts(plan.rows, self._everything(unit))
        report.largest_deviation = largest_deviation(amounts)
        delivered = np.zeros(len(self._corpora))  # of the last sources too, which may have lost all they had
        delivered[: amounts.shape[1]] = amounts.sum(axis=0) / max(amounts.sum(), 1e-300)
        sums = [
            float(corpus.amounts(unit).sum()) * times for corpus, times in zip(self._corpora, self.passes, strict=True)
        ]
        for corpus, wanted, share in zip(self._corpora, sums, delivered.tolist(), strict=True):
            source = report.sources[f"train/{corpus.name}"]
            source.wanted, source.delivered = wanted / max(sum(sums), 1e-300), share

    @property
    def _unit(self) -> BlendUnit:
        """What shares are counted in; passes over a source are no share, so there it is tokens."""
        return "tokens" if self._blend.by == "epochs" else self._blend.by

    def _choice(self, epoch: int) -> Choice:
        everything = self._everything(self._unit)
        chosen = choose(self._amounts, self.passes, seed=self._seed, epoch=epoch)
        return everything.take(
            np.concatenate(
                [
                    corpus.examples[mine] + first
                    for corpus, mine, first in zip(self._corpora, chosen, self.corpora.firsts, strict=False)
                ]
            )
        )

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def _everything(self, unit: BlendUnit) -> Choice:
        """Return all examples of all sources, those that are not in as well."""
        amounts = np.zeros(len(self.corpora.kept))
        for corpus, first in zip(self._corpora, self.corpora.firsts, strict=False):
            amounts[corpus.examples + first] = corpus.amounts(unit)
        sources = np.repeat(np.arange(len(self._corpora)), np.diff(self.corpora.firsts))
        return Choice(np.arange(len(amounts)), sources, self.corpora.kept, amounts)


def plan_evaluation(corpus: Corpus, *, packing: Packing, max_length: int, rows_per_step: int) -> EpochPlan:
    """Plan every example of a corpus once, in order.

    Args:
        corpus: What is evaluated on.
        packing: How examples share rows.
        max_length: Tokens per row.
        rows_per_step: Rows that all ranks take together.
    """
    examples, lengths = corpus.examples, corpus.kept[corpus.examples]
    return plan_epoch(
        Choice(examples, np.zeros_like(examples), lengths, lengths.astype(np.float64)),
        Corpora([corpus]).weigh,
        packing=packing,
        max_length=max_length,
        rows_per_step=rows_per_step,
        shuffle=None,
    )
