"""Weights → which example of which source is seen in an epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def blend(num_examples: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Choose the examples of one epoch.

    A source with weight w gives round(w · n) of its n examples. The whole part of w repeats the source; the rest is
    taken from a shuffle that moves on from epoch to epoch, so that 0.5 shows the other half in the next epoch and
    nothing is seen twice before everything was seen once.

    Args:
        num_examples: Examples of each source.
        weights: Weight of each source.
        seed: Seed of the run.
        epoch: Epoch, from 0.

    Returns:
        Global example indices (sources one after the other), in ascending order with repeats.
    """
    chosen = []
    first = 0
    for source, (count, weight) in enumerate(zip(num_examples, weights, strict=True)):
        per_epoch = round(weight * count)
        chosen.append(first + _window(count, per_epoch * epoch, per_epoch, seed=seed, source=source))
        first += count
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def _window(count: int, start: int, size: int, *, seed: int, source: int) -> npt.NDArray[np.int64]:
    """Return `size` entries from `start` on of the endless sequence of shuffles of range(count)."""
    if size == 0:
        return np.zeros(0, np.int64)
    rounds = range(start // count, (start + size - 1) // count + 1)
    shuffles = [np.random.default_rng((seed, source, number)).permutation(count) for number in rounds]
    offset = start - rounds[0] * count
    return np.concatenate(shuffles)[offset : offset + size]
