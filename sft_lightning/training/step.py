"""What is known of the optimizer step under way: its loss so far, whether losses stay finite, the scale of the loss.

Everything stays on its device, so that no step waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sft_lightning.compat.torch import loss_scale
from sft_lightning.errors import UserError


class StepShare(NamedTuple):
    """A micro-batch's share of what its optimizer step reports."""

    loss: torch.Tensor
    """Share of the step's mean loss, a scalar with a graph."""

    means: torch.Tensor | None = None
    """Shares of the step's other means, detached, (K,); `None` if there are none."""


class StepSums:
    """Adds up the shares of an optimizer step's micro-batches."""

    def __init__(self) -> None:
        self.loss: torch.Tensor | None = None
        """Loss of this process so far, a detached scalar; `None` between two steps."""

        self.means: torch.Tensor | None = None
        """Other means of this process so far, (K,); `None` if there are none."""

    def add(self, share: StepShare) -> None:
        """Add a micro-batch."""
        loss = share.loss.detach()
        self.loss = loss if self.loss is None else self.loss + loss
        if share.means is not None:
            self.means = share.means if self.means is None else self.means + share.means

    def clear(self) -> None:
        """Begin the next step."""
        self.loss = self.means = None


class NonfiniteLosses:
    """Counts losses in a row that are NaN or infinite.

    Args:
        limit: `model.max_nonfinite_losses`; `None` for no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._in_a_row: torch.Tensor | None = None
        self._found: torch.Tensor | None = None

    @property
    def in_a_row(self) -> int:
        """Optimizer steps in a row whose loss was not finite, up to now; waits for the device, 0 without a limit."""
        return 0 if self._in_a_row is None else int(self._in_a_row)

    def note(self, loss: torch.Tensor, step: int) -> None:
        """Count the loss of an optimizer step, on its device.

        Args:
            loss: A scalar.
            step: Number of the optimizer step, from 1.
        """
        if self._limit is None:
            return
        if self._in_a_row is None or self._found is None:
            self._in_a_row = torch.zeros((), dtype=torch.int64, device=loss.device)
            self._found = torch.zeros_like(self._in_a_row)
        self._in_a_row = torch.where(torch.isfinite(loss.detach()), 0, self._in_a_row + 1)
        reached = (self._in_a_row == self._limit) & (self._found == 0)
        self._found = torch.where(reached, step, self._found)

    def check(
        self, largest_of_ranks: Callable[[torch.Tensor], torch.Tensor], describe_rows: Callable[[int], list[str]]
    ) -> None:
        """Stop the run if the limit was reached on any rank; waits for the device.

        Args:
            largest_of_ranks: Reduces a scalar over all ranks, so that all of them stop.
            describe_rows: Returns where the records of an optimizer step's rows are.

        Raises:
            UserError: With the step and its records.
        """
        if self._limit is None:
            return
        step = int(largest_of_ranks(torch.zeros((), dtype=torch.int64) if self._found is None else self._found))
        if step:
            raise nonfinite_error(self._limit, step, describe_rows(step))


def nonfinite_error(limit: int, step: int, records: list[str]) -> UserError:
    """Return the error that stops the run.

    Args:
        limit: Number of losses in a row that were not finite.
        step: The last of these optimizer steps, from 1.
        records: Where the records of its rows are.
    """
    return UserError(
        f"model.max_nonfinite_losses: the loss was NaN or infinite in {limit} optimizer steps in a row; the last one, "
        f"step {step}, trained on {'; '.join(records)}. Continue from a checkpoint before step {step - limit + 1} with "
        "a lower learning rate, with bfloat16 or float32 instead of float16 (model.dtype, trainer.precision), or "
        "without those records; max_nonfinite_losses: null never stops"
    )


class LossScale:
    """Watches the scale of a `torch.amp.GradScaler`.

    The scaler skips a step whose gradients are not finite, and lowers its scale; a lower scale is how this is noticed.
    """

    def __init__(self) -> None:
        self._last: torch.Tensor | None = None
        self._overflows: torch.Tensor | None = None

    def note(self, scaler: Any) -> dict[str, torch.Tensor]:
        """Look at the scaler after an optimizer step.

        Args:
            scaler: The scaler; it has no scale before the first step.

        Returns:
            `train/loss_scale` and `train/loss_scale_overflows`, float32 scalars; the second counts from the start of
            this process. Empty before the first step.
        """
        scale, first = loss_scale(scaler)
        if scale is None:
            return {}
        scale = scale.detach().clone()  # the scaler changes it in place
        if self._last is None or self._overflows is None:
            self._last = torch.full_like(scale, first)  # so that the first step counts too
            self._overflows = torch.zeros_like(scale)
        self._overflows = self._overflows + (scale < self._last)
        self._last = scale
        return {"train/loss_scale": scale, "train/loss_scale_overflows": self._overflows}
