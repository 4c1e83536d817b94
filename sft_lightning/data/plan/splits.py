"""Number of records → which of them are trained on, held out, or left to another stage of training."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from sft_lightning.errors import UserError

Mask = npt.NDArray[np.bool_]
"""For each record of a source, whether it is in, (N,)."""

Compat = Literal["deepspeed_chat"]
"""Systems whose splits can be repeated to the record."""


def hold_out(members: Mask, fraction: float, *, seed: tuple[int, int]) -> tuple[Mask, Mask]:
    """Divide a source's records by a seeded draw.

    Args:
        members: The records to divide.
        fraction: Share of them to hold out, at least one record.
        seed: Seed of the run, and number of the source.

    Returns:
        (train, held out), disjoint.

    Raises:
        UserError: If nothing would be left to train on.
    """
    indices = np.flatnonzero(members)
    num_held_out = max(1, round(fraction * len(indices)))
    if num_held_out >= len(indices):
        raise UserError(f"data.val_fraction: {fraction} of {len(indices)} records leaves none to train on")
    drawn = indices[np.random.default_rng(seed).permutation(len(indices))[:num_held_out]]
    held_out = np.zeros_like(members)
    held_out[drawn] = True
    return members & ~held_out, held_out


def parse_data_split(text: str) -> list[float]:
    """Return the proportions of `data.data_split`.

    Raises:
        UserError: If it is not a list of numbers of at least 0, one of them above 0.
    """
    try:
        proportions = [float(part) for part in text.split(",")]
    except ValueError:
        proportions = []
    if not proportions or min(proportions) < 0 or not 0 < sum(proportions) < float("inf"):
        raise UserError(
            f"data.data_split: {text!r} is not a list of proportions, such as '2,4,4' for three stages or '10,0,0' for "
            "everything in the first"
        )
    return proportions


def check_part(data_split: str, part: int) -> list[float]:
    """Return the proportions of `data.data_split`.

    Raises:
        UserError: If it is no list of proportions, or has no such part.
    """
    proportions = parse_data_split(data_split)
    if not 0 <= part < len(proportions):
        raise UserError(
            f"data.data_split_part: {part}, but data_split {data_split!r} has the parts 0 to {len(proportions) - 1}"
        )
    return proportions


def stage_records(
    num_records: int, data_split: str, part: int, *, seed: int, compat: Compat | None = None
) -> list[int]:
    """Return the records of one stage of training, as indices; the stages are disjoint and together everything.

    With `compat="deepspeed_chat"` sizes and members are those of DeepSpeed-Chat (`get_raw_dataset_split_index` in
    dschat/utils/data/data_utils.py): rounding errors of the cumulative sizes are all taken from the first stage.

    Args:
        num_records: Records of the source.
        data_split: Proportions of the stages, such as `2,4,4`.
        part: Stage, from 0.
        seed: Seed of the run.
        compat: Whose rule to follow instead of ours.

    Raises:
        UserError: If the stage gets none of the records.
    """
    proportions = check_part(data_split, part)
    if compat == "deepspeed_chat":
        order, bounds = np.random.RandomState(seed).permutation(num_records), _deepspeed_chat(num_records, proportions)
    else:
        order, bounds = np.random.default_rng((seed, 2)).permutation(num_records), _bounds(num_records, proportions)
    members: list[int] = order[bounds[part] : bounds[part + 1]].tolist()
    if not members:
        raise UserError(
            f"data.data_split: {data_split!r} gives part {part} none of {num_records} records; change data_split, or "
            "mark the source sft_only"
        )
    return members


def _bounds(num_records: int, proportions: list[float]) -> list[int]:
    """Round the cumulative shares: no stage is off by more than one record."""
    shares = np.cumsum([0.0, *proportions]) / sum(proportions)
    return [round(float(share) * num_records) for share in shares]


def _deepspeed_chat(num_records: int, proportions: list[float]) -> list[int]:
    bounds = [0]
    for proportion in proportions:
        bounds.append(bounds[-1] + round(proportion / sum(proportions) * num_records))
    too_many = bounds[-1] - num_records
    # Never below 0, where DeepSpeed-Chat's slices count from the end and give a record to two stages ("0,5,5" of 3).
    return [0, *(max(0, bound - too_many) for bound in bounds[1:])]
