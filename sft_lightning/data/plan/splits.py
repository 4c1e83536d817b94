"""Number of records → which of them are trained on, held out, or left to another training stage."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from sft_lightning.errors import UserError

Mask = npt.NDArray[np.bool_]
"""For each record of a source, whether it is in the split, (records,)."""

Compat = Literal["deepspeed_chat"]
"""Systems whose splits can be reproduced exactly."""


def hold_out(members: Mask, fraction: float, *, seed: tuple[int, int]) -> tuple[Mask, Mask]:
    """Draw the records of a source that are held out for validation.

    Args:
        members: The records to divide, (records,).
        fraction: Share of them to hold out, at least one record.
        seed: Seed of the run, and number of the source.

    Returns:
        Training and held-out records, both (records,).

    Raises:
        UserError: If no record would be left to train on.
    """
    indices = np.flatnonzero(members)
    num_held_out = max(1, round(fraction * len(indices)))
    if num_held_out >= len(indices):
        raise UserError(
            f"data.val_fraction: {fraction} of {len(indices)} records leaves no record to train on; "
            "lower it, or set data.val_sources instead"
        )
    drawn = indices[np.random.default_rng(seed).permutation(len(indices))[:num_held_out]]
    held_out = np.zeros_like(members)
    held_out[drawn] = True
    return members & ~held_out, held_out


def parse_data_split(text: str) -> list[float]:
    """Return the proportions of `data.data_split`.

    Raises:
        UserError: If it is not a list of numbers of at least 0, with one above 0.
    """
    try:
        proportions = [float(part) for part in text.split(",")]
    except ValueError:
        proportions = []
    if not proportions or min(proportions) < 0 or not 0 < sum(proportions) < float("inf"):
        raise UserError(
            f"data.data_split: {text!r} is not a list of proportions; write '2,4,4' for three stages, or '10,0,0' for "
            "all records in the first"
        )
    return proportions


def check_part(data_split: str, part: int) -> list[float]:
    """Return the proportions of `data.data_split`, and check that there is such a stage.

    Args:
        data_split: The proportions as written.
        part: `data.data_split_part`.

    Raises:
        UserError: If it is not a list of proportions, or has no such stage.
    """
    proportions = parse_data_split(data_split)
    if not 0 <= part < len(proportions):
        raise UserError(
            f"data.data_split_part: must be 0 to {len(proportions) - 1} with data_split {data_split!r} (got {part})"
        )
    return proportions


def stage_records(
    num_records: int, data_split: str, part: int, *, seed: int, compat: Compat | None = None
) -> list[int]:
    """Return the records of one training stage, as indices; every record is in exactly one stage.

    With `compat="deepspeed_chat"` the stages are those of DeepSpeed-Chat (`get_raw_dataset_split_index` in
    dschat/utils/data/data_utils.py), which corrects the rounding of all sizes in the first stage.

    Args:
        num_records: Records of the source.
        data_split: Proportions of the stages, such as `2,4,4`.
        part: Number of the stage, from 0.
        seed: Seed of the run.
        compat: Another system's rule to follow, instead of ours.

    Raises:
        UserError: If the stage gets no record.
    """
    proportions = check_part(data_split, part)
    if compat == "deepspeed_chat":
        order, bounds = np.random.RandomState(seed).permutation(num_records), _deepspeed_chat(num_records, proportions)
    else:
        order, bounds = np.random.default_rng((seed, 2)).permutation(num_records), _bounds(num_records, proportions)
    members: list[int] = order[bounds[part] : bounds[part + 1]].tolist()
    if not members:
        raise UserError(
            f"data.data_split: {data_split!r} gives stage {part} no record of {num_records}; change data_split, or set "
            "sft_only: true on the source"
        )
    return members


def deepspeed_chat_part(num_records: int, *, evaluation: bool, seed: int) -> list[int]:
    """Return the training or the evaluation records that DeepSpeed-Chat takes from a data set with one split, 9:1.

    Args:
        num_records: Records of the data set.
        evaluation: The tenth for evaluation instead of the nine for training.
        seed: Seed of the run.

    Returns:
        Their indices, in the order in which `stage_records` divides them further.
    """
    return stage_records(num_records, "9,1", int(evaluation), seed=seed, compat="deepspeed_chat")


def _bounds(num_records: int, proportions: list[float]) -> list[int]:
    """Return where each stage starts, and the end: rounded cumulative shares, off by one record at most."""
    shares = np.cumsum([0.0, *proportions]) / sum(proportions)
    return [round(float(share) * num_records) for share in shares]


def _deepspeed_chat(num_records: int, proportions: list[float]) -> list[int]:
    """Return where each stage starts, and the end, by DeepSpeed-Chat's rule."""
    bounds = [0]
    for proportion in proportions:
        bounds.append(bounds[-1] + round(proportion / sum(proportions) * num_records))
    too_many = bounds[-1] - num_records
    # Never below 0, where DeepSpeed-Chat's slices count from the end and give a record to two stages ("0,5,5" of 3).
    return [0, *(max(0, bound - too_many) for bound in bounds[1:])]
