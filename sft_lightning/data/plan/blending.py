"""Weights → how many passes over each source an epoch has, which examples, and how the sources take turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sft_lightning.errors import UserError
from sft_lightning.types import Longs

Amounts = npt.NDArray[np.float64]
"""What each of E examples counts, in the unit of the blend, (E,)."""

BlendUnit = Literal["epochs", "examples", "tokens", "supervised_tokens"]
"""What the weights of the sources count."""


@dataclass(frozen=True, kw_only=True)
class BlendConfig:
    """How the weights of the sources are read.

    Raises:
        UserError: If `temperature` is not positive.
    """

    by: BlendUnit = "epochs"
    """What `weight` counts. epochs: passes over the source in an epoch. examples, tokens, supervised_tokens: the
    source's share of these, relative to the other weights; the epoch ends when one source was seen `max_epochs`
    times."""

    temperature: float = 1.0
    """Shares are raised to 1 / temperature. Above 1, small sources are seen more often (mT5, Xue et al., 2021)."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"data.blend.temperature: must be above 0 (got {self.temperature})")


def passes_per_epoch(
    amounts: Sequence[float], weights: Sequence[float], max_epochs: Sequence[float], blend: BlendConfig
) -> list[float]:
    """Return how many times each source is seen in an epoch.

    Args:
        amounts: Amount of each source in the unit of the blend; all above 0.
        weights: Weight of each source.
        max_epochs: Limit on the passes over each source, if weights are shares.
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


def choose_examples(amounts: Sequence[Amounts], passes: Sequence[float], *, seed: int, epoch: int) -> list[Longs]:
    """Choose the examples of one epoch.

    Each source is an endless sequence of shuffles of its examples. An epoch continues where the last one ended, and
    takes examples until it has its amount. So with 0.5 passes the next epoch has the other half, and no example is seen
    twice before every example was seen once. Over any number of epochs, the amount taken is off by at most one example.

    Args:
        amounts: What each example of each source counts, in the unit of the blend.
        passes: How many times each source is seen in an epoch.
        seed: Seed of the run.
        epoch: Epoch, from 0.

    Returns:
        The examples of each source, numbered from 0 within the source, in ascending order, with repeats.
    """
    return [
        np.sort(_window(each, epoch * times, (epoch + 1) * times, (seed, source)))
        for source, (each, times) in enumerate(zip(amounts, passes, strict=True))
    ]


def _window(amounts: Amounts, start: float, stop: float, seed: tuple[int, int]) -> Longs:
    """Return the examples between two points of the endless sequence of shuffles, both in passes."""
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
    """Order rows so that every prefix has each source's share, to within one row.

    This is worst-case fair weighted fair queueing (Bennett and Zhang, 1996), with every source served until the end:
    the next row comes from the source whose row is due first, among those that are not ahead of their share.

    Args:
        amounts: Amount of each source in each row, (R, sources).
        owners: The source whose turn each row takes, (R,); the rows of a source keep their order.

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
    """Return the amount of all sources together at which a source's next row should be complete."""
    return (had + own[queue[-1]]) / share if queue and share else float("inf")


def largest_deviation(amounts: npt.NDArray[np.float64]) -> float:
    """Return how far a source is from its share at the worst prefix of the rows, in rows.

    Args:
        amounts: Amount of each source in each row, in order, (R, sources).
    """
    if not amounts.any():
        return 0.0
    shares = amounts.sum(axis=0) / amounts.sum()
    so_far = np.cumsum(amounts, axis=0)
    off = np.abs(so_far - so_far.sum(axis=1, keepdims=True) * shares)
    return float(off.max() / amounts.sum(axis=1).max())
