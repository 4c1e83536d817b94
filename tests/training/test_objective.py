from __future__ import annotations

import math

import pytest
import torch

from sft_lightning.training.losses import LossSums
from sft_lightning.training.objective import TokenMeans


def sums(loss: float, weight: float, correct: float) -> LossSums:
    return LossSums(torch.tensor(loss), torch.tensor(weight), torch.tensor(correct))


def test_means_are_per_token_not_per_batch() -> None:
    means = TokenMeans()
    means.update(sums(2.0, 1.0, 1.0))
    means.update(sums(30.0, 9.0, 4.0))
    computed = means.compute()
    assert computed["loss"].item() == pytest.approx(3.2)
    assert computed["perplexity"].item() == pytest.approx(math.exp(3.2))
    assert computed["token_accuracy"].item() == pytest.approx(0.5)


def test_perplexity_overflows_to_infinity() -> None:
    means = TokenMeans()
    means.update(sums(1e6, 1.0, 0.0))
    assert means.compute()["perplexity"].item() == math.inf
