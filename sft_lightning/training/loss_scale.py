"""What a gradient scaler does under float16: its scale, and how often it fell because gradients overflowed."""

from __future__ import annotations

from typing import Any

import torch

from sft_lightning.compat.torch import loss_scale


class LossScale:
    """Watches a `torch.amp.GradScaler` without a device sync.

    A step whose gradients are not finite is skipped by the scaler, and the scale falls; that is how it is seen here.
    """

    def __init__(self) -> None:
        self._last: torch.Tensor | None = None
        self._overflows: torch.Tensor | None = None

    def note(self, scaler: Any) -> dict[str, torch.Tensor]:
        """Look at the scaler after an optimizer step.

        Args:
            scaler: The scaler; its scale does not exist before the first step.

        Returns:
            `train/loss_scale` and `train/loss_scale_overflows`, float32 scalars; the second counts from the start of
            this process. Nothing before the first step.
        """
        scale, first = loss_scale(scaler)
        if scale is None:
            return {}
        scale = scale.detach().clone()  # changed in place by the scaler
        if self._last is None or self._overflows is None:
            # The first step is seen too: the scale that it began with is known.
            self._last = torch.full_like(scale, first)
            self._overflows = torch.zeros_like(scale)
        self._overflows = self._overflows + (scale < self._last)
        self._last = scale
        return {"train/loss_scale": scale, "train/loss_scale_overflows": self._overflows}
