"""Weights → how much of which source an epoch has, which examples, and in what order the sources take turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sft_lightning.errors import UserError

Longs = npt.NDArray[np.int64]
Amounts = npt.NDArray[np.float64]

BlendUnit = Literal["epochs", "examples", "tokens", "supervised_tokens"]


@dataclass(frozen=True, kw_only=True)
class BlendConfig:
    """What the weights of the sources mean.

    Raises:
        UserError: If `temperature` is not positive.
    """

    by: BlendUnit = "epochs"
    """What `weight` counts. epochs: passes over the source per epoch. examples, tokens, supervised_tokens: the source's
    share of that, relative to the other weights; the epoch ends when the first source was seen `max_epochs` times."""

    temperature: float = 1.0
    """Shares are raised to 1 / temperature: above 1, small sources are seen more often (mT5, Xue et al., 2021)."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"data.blend.temperature: must be above 0 (got {self.temperature})")


def passes(
    amounts: Sequence[float], weights: Sequence[float], max_epochs: Sequence[float], blend: BlendConfig
) -> list[float]:
    """Return how many times each source is seen in an epoch.

    Args:
        amounts: What each source holds, in the blend's unit; all above 0.
        weights: Weight of each source.
        max_epochs: Most passes over each source, where weights are shares.
        blend: What the weights mean.
    """
    sizes, given = np.array(amounts, np.float64), np.array(weights, np.float64)
    if blend.by == "epochs" and blend.temperature == 1:
        return list(weights)
    wanted = given * sizes if blend.by == "epochs" else given
    shares = (wanted / wanted.sum()) ** (1 / blend.temperature)
    shares /= shares.sum()
    total = wanted.sum() if blend.by == "epochs" else (np.array(max_epochs) * sizes / shares).min()
    result: list[float] = (shares * total / sizes).tolist()
    return result


def choose(amounts: Sequence[Amounts], passes: Sequence[float], *, seed: int, epoch: int) -> list[Longs]:
    """Choose the examples of one epoch.

    Each source is an endless sequence of shuffles of its examples. An epoch takes from it, on from where the epoch
    before ended, until it has its amount: so 0.5 passes show the other half in the next epoch, and nothing is seen
    twice before everything was seen once. The amount taken is never off by more than one example, over any number of
    epochs.

    Args:
        amounts: What each example of each source counts, in the blend's unit.
        passes: How many times each source is seen in an epoch.
        seed: Seed of the run.
        epoch: Epoch, from 0.

    Returns:
        Examples of each source, counted from 0 in the source, in ascending order with repeats.
    """
    return [
        np.sort(_window(each, epoch * times, (epoch + 1) * times, (seed, source)))
        for source, (each, times) in enumerate(zip(amounts, passes, strict=True))
    ]


def _window(amounts: Amounts, start: float, stop: float, seed: tuple[int, int]) -> Longs:
    """Return the examples between two points of the endless sequence, both in passes."""
    chosen = []
    for number in range(int(start), int(np.ceil(stop))):
        if start <= number and stop >= number + 1:
            chosen.append(np.arange(len(amounts)))  # all of a shuffle; the caller sorts
            continue
        order = np.random.default_rng((*seed, number)).permutation(len(amounts))
        middles = np.cumsum(amounts[order]) - amounts[order] / 2
        first, end = (point - number for point in (start, stop))
        inside = (middles > first * amounts.sum()) & (middles <= end * amounts.sum())
        chosen.append(order[inside])
    return np.concatenate(chosen) if chosen else np.zeros(0, np.int64)


def take_turns(amounts: npt.NDArray[np.float64], owners: Longs) -> Longs:
    """Order rows so that at every prefix each source has its share, give or take one row.

    Worst-case fair weighted fair queueing (Bennett and Zhang, 1996) with every source served until the end: of the
    sources that are not ahead of their share, the one whose next row is due first.

    Args:
        amounts: What each row has of each source, (R, sources).
        owners: The source that each row counts for when its turn is chosen, (R,); rows of a source keep their order.

    Returns:
        Row indices, (R,).
    """
    totals = amounts.sum(axis=0)
    shares = (totals / max(totals.sum(), 1e-300)).tolist()
    queues = [np.flatnonzero(owners == source)[::-1].tolist() for source in range(amounts.shape[1])]
    own = amounts[np.arange(len(owners)), owners].tolist()
    mixed = (amounts > 0).sum(axis=1) > 1
    due = [_due(queue, own, 0.0, share) for queue, share in zip(queues, shares, strict=True)]
    had = [0.0] * len(queues)
    delivered = 0.0
    order: list[int] = []
    while len(order) < len(owners):
        waiting = [source for source, queue in enumerate(queues) if queue]
        ready = [s for s in waiting if had[s] <= shares[s] * delivered + 1e-6] or waiting
        source = min(ready, key=due.__getitem__)
        row = queues[source].pop()
        order.append(row)
        for other in np.flatnonzero(amounts[row]).tolist() if mixed[row] else [source]:
            had[other] += float(amounts[row, other])
            due[other] = _due(queues[other], own, had[other], shares[other])
        delivered = sum(had)
    return np.array(order, np.int64)


def _due(queue: Sequence[int], own: Sequence[float], had: float, share: float) -> float:
    """Return how much all sources together have delivered when a source's next row ought to be complete."""
    return (had + own[queue[-1]]) / share if queue and share else float("inf")


def largest_deviation(amounts: npt.NDArray[np.float64]) -> float:
    """Return how far, at the worst prefix, a source's share is from its share of all rows, in rows.

    Args:
        amounts: What each row has of each source, in order, (R, sources).
    """
    if not amounts.any():
        return 0.0
    shares = amounts.sum(axis=0) / amounts.sum()
    so_far = np.cumsum(amounts, axis=0)
    off = np.abs(so_far - so_far.sum(axis=1, keepdims=True) * shares)
    return float(off.max() / amounts.sum(axis=1).max())
