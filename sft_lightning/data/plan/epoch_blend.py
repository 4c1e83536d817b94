"""Weights of the sources → which examples each training epoch has."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from sft_lightning.data.plan.blending import BlendConfig, BlendUnit, choose_examples, passes_per_epoch
from sft_lightning.data.plan.epoch_plan import EpochExamples
from sft_lightning.data.plan.split_examples import JoinedExamples, SplitExamples
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.errors import UserError


class EpochBlend:
    """Chooses the examples of each epoch.

    Args:
        parts: The training examples, in the order of the sources.
        sources: Configuration of each source.
        blend: What the weights of the sources mean.
        seed: Seed of the run.

    Raises:
        UserError: If a weight leaves a source without a single example.
    """

    def __init__(
        self, parts: Sequence[SplitExamples], sources: Sequence[SourceConfig], blend: BlendConfig, seed: int
    ) -> None:
        self.examples = JoinedExamples(parts)
        """All training examples, numbered through the sources."""
        self._blend = blend
        self._seed = seed
        self._amounts = [part.amounts(blend.by) for part in parts]
        used = [i for i, amounts in enumerate(self._amounts) if len(amounts)]  # others have lost every example
        found = passes_per_epoch(
            [float(self._amounts[i].sum()) for i in used],
            [sources[i].weight for i in used],
            [sources[i].max_epochs for i in used],
            blend,
        )
        self.passes = [0.0] * len(parts)
        """How many times each source is seen in an epoch."""
        for i, times in zip(used, found, strict=True):
            self.passes[i] = times
            if not len(choose_examples([self._amounts[i]], [times], seed=seed, epoch=0)[0]):
                raise UserError(
                    f"data.sources.{parts[i].name}.weight: {sources[i].weight} of {len(self._amounts[i])} examples "
                    "is less than one example; raise the weight, or remove the source"
                )

    @property
    def repeats(self) -> bool:
        """Whether every epoch has the same examples, and so the same number of rows."""
        return all(times == int(times) for times in self.passes)

    @property
    def unit(self) -> BlendUnit:
        """What shares are counted in: tokens if the weights are passes over the sources."""
        return "tokens" if self._blend.by == "epochs" else self._blend.by

    def epoch_examples(self, epoch: int) -> EpochExamples:
        """Return the examples of an epoch, source by source."""
        chosen = choose_examples(self._amounts, self.passes, seed=self._seed, epoch=epoch)
        parts, firsts = self.examples.parts, self.examples.firsts
        numbers = [part.indices[mine] + first for part, mine, first in zip(parts, chosen, firsts, strict=False)]
        return self.all_examples.take(np.concatenate(numbers))

    @functools.cached_property
    def all_examples(self) -> EpochExamples:
        """Every example of every source once, in order, including those that are not in the split."""
        parts, firsts, kept = self.examples.parts, self.examples.firsts, self.examples.kept
        amounts = np.zeros(len(kept))
        for part, first in zip(parts, firsts, strict=False):
            amounts[part.indices + first] = part.amounts(self.unit)
        sources = np.repeat(np.arange(len(parts)), np.diff(firsts))
        return EpochExamples(np.arange(len(kept)), sources, kept, amounts)

    def wanted_shares(self) -> list[float]:
        """Return the share of an epoch that the weights ask for, for each source; 0 to 1, in `unit`."""
        sums = [
            float(corpus.amounts(self.unit).sum()) * times
            for corpus, times in zip(self.examples.parts, self.passes, strict=True)
        ]
        return [amount / max(sum(sums), 1e-300) for amount in sums]
