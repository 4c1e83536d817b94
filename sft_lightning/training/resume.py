"""Where a continued run stands, whatever the checkpoint's micro-batches were.

Lightning counts micro-batches; a checkpoint may fall between two of one optimizer step (whose gradients it does not
hold), or come from a run that split the same global batch in another way. What counts is the optimizer step.
"""

from __future__ import annotations

from typing import Any


def align_progress(fit_loop: dict[str, Any], micro_batches: int) -> None:
    """Set Lightning's counters of the epoch, in a checkpoint's `loops["fit_loop"]`, to `micro_batches`.

    Counters that say so already stay as they are.
    """
    progress = fit_loop["epoch_loop.batch_progress"]
    if progress["current"]["ready"] == micro_batches:
        return
    for counter, current in progress["current"].items():
        progress["total"][counter] += micro_batches - current
        progress["current"][counter] = micro_batches


def reopen_epoch(fit_loop: dict[str, Any], epoch: int) -> None:
    """Count an epoch as unfinished, in a checkpoint's `loops["fit_loop"]`.

    A run that reaches `max_steps` within an epoch ends the epoch, as far as Lightning is concerned; continued with more
    steps, it would skip the epoch's other rows. So it would if the epoch has become longer, as a stream's does.
    """
    fit_loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    progress = fit_loop["epoch_progress"]
    for counter in ("processed", "completed"):
        ahead = max(0, progress["current"][counter] - epoch)
        progress["total"][counter] -= ahead
        progress["current"][counter] -= ahead
