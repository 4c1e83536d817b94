from __future__ import annotations

import torch
from torch import nn

from sft_lightning.models.export.fingerprint import weight_fingerprint


def test_a_changed_weight_or_buffer_changes_the_fingerprint() -> None:
    model = nn.BatchNorm1d(2)
    first = weight_fingerprint(model)
    assert weight_fingerprint(model) == first
    with torch.no_grad():
        model.weight[1] += 1
    second = weight_fingerprint(model)
    model.running_mean[0] = 1
    assert len({first, second, weight_fingerprint(model)}) == 3


def test_a_partitioned_weight_counts_with_the_processs_own_part() -> None:
    """ZeRO-3 leaves an empty tensor in a parameter's place, and puts this process's part beside it."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.empty(0)
    found = set()
    for value in (0.0, 1.0):
        model.weight.ds_tensor = torch.full((2,), value)
        found.add(weight_fingerprint(model))
    assert len(found) == 2
