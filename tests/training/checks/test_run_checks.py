from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sft_lightning.checks import CheckError, CheckLog
from sft_lightning.training.checks.run_checks import RunChecks


def test_a_model_with_a_part_in_evaluation_mode_does_not_train() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout())
    module = SimpleNamespace(checks=CheckLog(), language_model=model)
    RunChecks().on_train_start(SimpleNamespace(), module)
    assert module.checks.checks[0].passed
    model[1].eval()
    with pytest.raises(CheckError, match="1 parts in evaluation mode: 1 …"):
        RunChecks().on_train_start(SimpleNamespace(), module)
