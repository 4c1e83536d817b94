"""The first epoch has every example as often as the weights of the YAML say, and the run has all its steps.

Everything is counted again from the token stores, the plan's rows and the YAML, by rules written down here once more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from sft_lightning.checks import Check
from sft_lightning.data.plan.blending import BlendConfig, BlendUnit
from sft_lightning.training.checks.hooks import RunCheck

if TYPE_CHECKING:
    from sft_lightning.data.plan.epoch_plan import EpochPlan
    from sft_lightning.data.plan.split_examples import SplitExamples
    from sft_lightning.data.sources.source import SourceConfig
    from sft_lightning.training.module import CausalLMModule

_DROPS_OF_EXAMPLES = ("too_short", "overlong", "no_supervised_tokens")
"""Reasons for which a report counts examples; it counts records for all others."""


class PlannedSource(NamedTuple):
    """A training source, as the YAML has it and as the plan has it."""

    name: str
    """Its name."""

    weight: float
    """Its weight in the YAML."""

    max_epochs: float
    """Its `max_epochs` in the YAML."""

    amounts: npt.NDArray[np.float64]
    """What each of its examples counts in the unit of the blend, (N,); 0 for one that is not in the split."""

    times: npt.NDArray[np.float64]
    """How many times the rows of the first epoch have each of them, (N,)."""


class Coverage(RunCheck):
    """Check the first epoch when training starts, and the number of optimizer steps when it ends."""

    def on_train_start(self, module: CausalLMModule) -> None:
        """Count the examples of the first epoch."""
        module.checks.run(lambda: _first_epoch(module))

    def on_train_end(self, module: CausalLMModule) -> None:
        """Compare the steps that were taken with those that were planned."""
        trainer = module.trainer
        stopped = trainer.should_stop or trainer.received_sigterm
        module.checks.run(lambda: check_steps(trainer.global_step, module.data.num_optimizer_steps, stopped=stopped))


def _first_epoch(module: CausalLMModule) -> Check:
    data = module.data
    if data.spec.streams:
        return Check("coverage", None, "streamed sources have no epochs")
    parts, configs = data.blend.examples.parts, data.spec.sources_of("train")
    lost = [line for part in parts for line in unaccounted(part)]
    if lost:
        return Check("coverage", False, "; ".join(lost))
    plan, blend = data.plan(0), data.spec.blend
    return check_coverage(planned_sources(plan, parts, [configs[part.name] for part in parts], blend.by), blend)


def unaccounted(part: SplitExamples) -> list[str]:
    """Return what is missing of a source: records without an example or a reason, examples not kept without one.

    Args:
        part: The examples that the split has of the source. If the split has only some of its records, nothing is said.
    """
    report, store = part.report, part.store
    if report.records != len(store.marks):
        return []
    dropped = sum(report.dropped[reason] for reason in _DROPS_OF_EXAMPLES)
    kept = int((part.kept > 0).sum())
    missing = []
    if kept + dropped != len(store):
        missing.append(f"source {part.name}: {len(store):,} examples, but {kept:,} kept and {dropped:,} dropped")
    used, lost = len(np.unique(store.records)), sum(report.dropped.values()) - dropped
    if used + lost != report.records:
        missing.append(f"source {part.name}: {report.records:,} records, but {used:,} used and {lost:,} dropped")
    return missing


def planned_sources(
    plan: EpochPlan, parts: Sequence[SplitExamples], configs: Sequence[SourceConfig], unit: BlendUnit
) -> list[PlannedSource]:
    """Count how often the rows of a plan have each example of each source.

    Args:
        plan: The first epoch.
        parts: The training examples, source by source; the plan numbers them through.
        configs: The sources in the YAML.
        unit: `data.blend.by`.
    """
    numbers, starts, stops = plan.documents.T
    tokens = np.bincount(numbers, weights=stops - starts, minlength=sum(len(part.kept) for part in parts))
    found, first = [], 0
    for part, config in zip(parts, configs, strict=True):
        own, first = tokens[first : first + len(part.kept)], first + len(part.kept)
        times = np.where(part.kept > 0, own / np.maximum(part.kept, 1), np.where(own > 0, np.inf, 0.0))
        found.append(PlannedSource(part.name, config.weight, config.max_epochs, _amounts(part, unit), times))
    return found


def _amounts(part: SplitExamples, unit: BlendUnit) -> npt.NDArray[np.float64]:
    """Return what each example of a store counts, (N,)."""
    if unit == "supervised_tokens":
        kept = np.stack([np.arange(len(part.kept)), np.zeros_like(part.kept), part.kept], axis=1)
        amounts = part.store.supervise(kept).astype(np.float64)
    else:
        amounts = part.kept.astype(np.float64) if unit == "tokens" else np.ones(len(part.kept))
    return np.where(part.kept > 0, amounts, 0.0)


def wanted_passes(sources: Sequence[PlannedSource], blend: BlendConfig) -> list[float]:
    """Return how many times an epoch should have each source, from the weights; 0 for a source without an example.

    Args:
        sources: The sources.
        blend: `data.blend`.
    """
    sizes = [float(source.amounts.sum()) for source in sources]
    if blend.by == "epochs":
        wanted = [source.weight * size for source, size in zip(sources, sizes, strict=True)]
    else:
        wanted = [source.weight if size else 0.0 for source, size in zip(sources, sizes, strict=True)]
    heated = [(each / sum(wanted)) ** (1 / blend.temperature) if each else 0.0 for each in wanted]
    shares = [each / sum(heated) for each in heated]
    used = [(source, size, share) for source, size, share in zip(sources, sizes, shares, strict=True) if size]
    by_size = sum(wanted) if blend.by == "epochs" else min(s.max_epochs * size / share for s, size, share in used)
    return [share * by_size / size if size else 0.0 for size, share in zip(sizes, shares, strict=True)]


def check_coverage(sources: Sequence[PlannedSource], blend: BlendConfig) -> Check:
    """Check that every example is in the first epoch as often as its source's weight says.

    With 1.5 passes, an example is there once or twice, and all of them together 1.5 times, to within one example.

    Args:
        sources: The sources.
        blend: `data.blend`.
    """
    wrong = []
    for source, passes in zip(sources, wanted_passes(sources, blend), strict=True):
        low, high = math.floor(passes + 1e-9), math.ceil(passes - 1e-9)
        used = source.amounts > 0
        off = (source.times < low - 1e-6) | (source.times > high + 1e-6)
        if (off & used).any() or (source.times[~used] > 0).any():
            wrong.append(f"{int((off & used).sum())} examples of {source.name} not {low} to {high} times")
        delivered, wanted = float((source.times * source.amounts).sum()), passes * float(source.amounts.sum())
        if not abs(delivered - wanted) <= float(source.amounts.max(initial=0)) + 1e-6 * wanted:
            wrong.append(f"{source.name} has {delivered:,.0f} of {wanted:,.0f} {_UNITS[blend.by]}")
    if wrong:
        return Check("coverage", False, "; ".join(wrong))
    total = sum(float(source.times.sum()) for source in sources)
    return Check("coverage", True, f"{total:,.0f} examples of {len(sources)} sources, as often as the weights say")


_UNITS = {"epochs": "examples", "examples": "examples", "tokens": "tokens", "supervised_tokens": "supervised tokens"}


def check_steps(taken: int, planned: int, *, stopped: bool) -> Check:
    """Check that a run that nothing has stopped took all its steps.

    Args:
        taken: Optimizer steps at the end.
        planned: Optimizer steps of the schedule.
        stopped: Whether the trainer was asked to stop: by `max_time`, early stopping or a signal.
    """
    figure = f"{taken:,} of {planned:,} planned"
    if stopped and taken < planned:
        return Check("optimizer steps", None, f"{figure}; the run was asked to stop")
    return Check("optimizer steps", taken == planned, figure)
