from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sft_lightning.checks import CheckError, CheckLog
from sft_lightning.training.checks.model.validation import ValidationWeight, check_weight
from sft_lightning.training.losses import LossSums
from sft_lightning.training.objective import SourceMeans, TokenMeans


def validate(batches: list[dict[str, Any]], means: SourceMeans) -> CheckLog:
    """Make the check of a validation that has these batches."""
    module: Any = SimpleNamespace(means=means, checks=CheckLog())
    check = ValidationWeight()
    check.on_validation_start(module)
    for batch in batches:
        check.on_validation_batch_end(module, batch, 0, 0)
    check.on_validation_end(module)
    return module.checks


@pytest.mark.parametrize("key", ["loss_weights", "pair_weights"])
def test_means_over_all_weights_pass_and_means_of_means_fail(key: str) -> None:
    batches = [{key: torch.tensor([0.0, 1.0, 1.0])}, {key: torch.tensor([0.5])}]
    if key == "pair_weights":
        batches = [{**batch, "loss_weights": torch.ones(7)} for batch in batches]
    means, means_of_means = (SourceMeans(["chats"], TokenMeans) for _ in range(2))
    for batch in batches:
        weight = batch[key].sum()
        means.update(0, LossSums(3 * weight, weight, weight))
        means_of_means.update(0, LossSums(torch.tensor(3.0), torch.tensor(1.0), torch.tensor(1.0)))
    (passed,) = validate(batches, means).checks
    assert passed.passed
    with pytest.raises(CheckError, match=r"means over a weight of 2, Σ weight of the batches is 2\.5"):
        validate(batches, means_of_means)


def test_a_validation_without_batches_has_no_weight() -> None:
    (check,) = validate([], SourceMeans(["chats"], TokenMeans)).checks
    assert check.passed


def test_the_order_of_a_sum_does_not_matter() -> None:
    assert check_weight(1e6 * (1 + 1e-9), 1e6).passed
    assert not check_weight(1e6 + 2, 1e6).passed
