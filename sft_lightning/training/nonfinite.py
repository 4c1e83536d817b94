"""Losses that are NaN or infinite, counted where they are: without a device sync per step."""

from __future__ import annotations

import torch

from sft_lightning.errors import UserError


class NonfiniteLosses:
    """Finds the optimizer step at which too many losses in a row were not finite.

    Args:
        limit: `model.max_nonfinite_losses`; `None` never finds one.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._in_a_row: torch.Tensor | None = None
        self._found: torch.Tensor | None = None

    def note(self, loss: torch.Tensor, step: int) -> None:
        """Count the loss of an optimizer step, on its device.

        Args:
            loss: A scalar.
            step: Number of the optimizer step, from 1.
        """
        if self.limit is None:
            return
        if self._in_a_row is None or self._found is None:
            self._in_a_row = torch.zeros((), dtype=torch.int64, device=loss.device)
            self._found = torch.zeros_like(self._in_a_row)
        self._in_a_row = torch.where(torch.isfinite(loss.detach()), 0, self._in_a_row + 1)
        reached = (self._in_a_row == self.limit) & (self._found == 0)
        self._found = torch.where(reached, step, self._found)

    @property
    def found(self) -> torch.Tensor:
        """The first optimizer step at which the limit was reached, from 1; 0 while there is none. A scalar, int64."""
        return torch.zeros((), dtype=torch.int64) if self._found is None else self._found


def nonfinite_error(limit: int, step: int, records: list[str]) -> UserError:
    """Return what stops a run.

    Args:
        limit: Losses in a row.
        step: The optimizer step of the last, from 1.
        records: Where the records of its rows stand.
    """
    return UserError(
        f"model.max_nonfinite_losses: the loss was not finite in {limit} optimizer steps in a row, the last of them "
        f"step {step}, which trained on {'; '.join(records)}. Continue from a checkpoint before step "
        f"{step - limit + 1} with a lower learning rate, model.dtype or trainer.precision in bfloat16 or float32 "
        "instead of float16, or without those records; null for no limit"
    )
