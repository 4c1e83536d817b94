from __future__ import annotations

import pytest
import torch

from sft_lightning.training.preference.losses import PairScores
from sft_lightning.training.preference.metrics import NAMES, PairMeans, pair_sums

POLICY = torch.tensor([[-10.0, -12.0], [-8.0, -3.0]], requires_grad=True)
SCORES = PairScores(torch.tensor([0.5, 1.5]), torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 2.0]))
WEIGHTS = torch.tensor([1.0, 3.0])


def means_of(*parts: slice) -> dict[str, float]:
    means = PairMeans()
    for part in parts:
        some = PairScores(*(column[part] for column in SCORES))
        means.update(pair_sums(some, POLICY[part], WEIGHTS[part]), WEIGHTS[part].sum())
    return {name: float(value) for name, value in means.compute().items()}


def test_means_are_weighted_by_pair() -> None:
    assert means_of(slice(0, 2)) == pytest.approx(
        {
            "loss": (0.5 + 3 * 1.5) / 4,
            "rewards/chosen": (1 - 3) / 4,
            "rewards/rejected": (-1 + 3 * 2) / 4,
            "rewards/margin": (2 - 3 * 3) / 4,
            "rewards/accuracy": 1 / 4,
            "log_probs/chosen": (-10 - 3 * 8) / 4,
            "log_probs/rejected": (-12 - 3 * 3) / 4,
        }
    )
    assert tuple(means_of(slice(0, 2))) == NAMES


def test_means_do_not_depend_on_how_pairs_are_split_over_micro_batches() -> None:
    assert means_of(slice(0, 1), slice(1, 2)) == pytest.approx(means_of(slice(0, 2)), rel=1e-6)


def test_equal_rewards_do_not_count_as_right_and_sums_have_no_graph() -> None:
    zero = torch.zeros(2)
    sums = pair_sums(PairScores(zero, zero, zero), POLICY, WEIGHTS)
    assert float(sums[NAMES.index("rewards/accuracy")]) == 0
    assert not sums.requires_grad
