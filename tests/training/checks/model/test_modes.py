from __future__ import annotations

import pytest
import torch

from sft_lightning.training.checks.model.modes import check_mode


@pytest.mark.parametrize("training", [True, False])
def test_a_part_in_the_other_mode_is_named(training: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout()).train(training)
    assert check_mode(model, training=training).passed
    model[1].train(not training)
    check = check_mode(model, training=training)
    assert check.passed is False
    assert check.figure == f"1 parts in {'evaluation' if training else 'training'} mode: 1 …"
