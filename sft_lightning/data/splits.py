"""Records → the ones to train on and the ones held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sft_lightning.errors import UserError
from sft_lightning.types import Record


def divide(records: Sequence[Record], fraction: float, *, seed: tuple[int, int]) -> tuple[list[Record], list[Record]]:
    """Divide a source's records by a seeded draw; both sides stay in file order.

    Args:
        records: All records of the source.
        fraction: Share to hold out, at least one record.
        seed: Seed of the run, and number of the source.

    Returns:
        (train, held out).

    Raises:
        UserError: If nothing would be left to train on.
    """
    held_out = max(1, round(fraction * len(records)))
    if held_out >= len(records):
        raise UserError(f"data.val_fraction: {fraction} of {len(records)} records leaves none to train on")
    drawn = set(np.random.default_rng(seed).permutation(len(records))[:held_out].tolist())
    return (
        [record for i, record in enumerate(records) if i not in drawn],
        [record for i, record in enumerate(records) if i in drawn],
    )
