"""Bytes of live tensors."""

from __future__ import annotations

import torch

from sft_lightning.training.memory.tracker import StorageTracker


def test_a_storage_counts_once_and_until_it_is_freed() -> None:
    known = torch.zeros(1000)
    with StorageTracker([known]) as tracker:
        view = known[:10]
        made = known + 1
        again = made.view(10, 100)
        assert tracker.live == 4000
        del made, view
        assert tracker.live == 4000
        del again
        assert tracker.live == 0
    assert tracker.peak == 4000
