from __future__ import annotations

import torch

from sft_lightning.selftest.checks.export import compare
from sft_lightning.selftest.evaluation import Evaluation


def evaluation(largest: float) -> Evaluation:
    return Evaluation(torch.tensor([[1.0, largest]]), 0.5)


def test_equal_logits_pass() -> None:
    assert compare(evaluation(8.0), evaluation(8.0), 1e-4).passed


def test_the_tolerance_is_relative_to_the_largest_logit() -> None:
    assert compare(evaluation(8.0), evaluation(8.0007), 1e-4).passed
    assert not compare(evaluation(8.0), evaluation(8.0009), 1e-4).passed


def test_nan_fails() -> None:
    assert not compare(evaluation(8.0), evaluation(float("nan")), 1e-4).passed
