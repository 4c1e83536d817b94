from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sft_lightning.training.losses import LossSums
from sft_lightning.training.objective import NextToken, SourceMeans, TokenMeans


def sums(loss: float, weight: float, correct: float = 0.0) -> LossSums:
    return LossSums(torch.tensor(loss), torch.tensor(weight), torch.tensor(correct))


class Module:
    """Has the loss sums that it is given."""

    device = torch.device("cpu")

    def __call__(self, batch: dict[str, Any]) -> LossSums:
        found: LossSums = batch["sums"]
        return found


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
    means.update(sums(1e6, 1.0))
    assert means.compute()["perplexity"].item() == math.inf


def test_all_sources_together_are_weighted_by_token_and_each_source_has_its_own_means() -> None:
    means = SourceMeans(["a", "b"], TokenMeans, per_source=["loss"])
    means.update(0, sums(2.0, 1.0))
    means.update(1, sums(30.0, 9.0))
    found = {name: float(value) for name, value in means.compute().items()}
    assert found["loss/a"] == pytest.approx(2.0)
    assert found["loss/b"] == pytest.approx(30 / 9)
    assert found["loss"] == pytest.approx(3.2)
    assert not any(name.startswith("perplexity/") for name in found)


@pytest.mark.parametrize(("denominator", "share"), [(8.0, 0.5), (0.0, 4.0)])
def test_a_micro_batchs_share_is_its_sum_divided_by_the_steps_denominator(denominator: float, share: float) -> None:
    found = NextToken().step_share(Module(), {"sums": sums(4.0, 2.0), "denominator": denominator})  # type: ignore[arg-type]
    assert float(found.loss) == share
    assert found.means is None


def test_an_evaluation_reports_loss_and_perplexity_of_each_source() -> None:
    objective, module = NextToken(), SimpleNamespace(device=torch.device("cpu"))
    means = objective.start_means(module, ["a"])  # type: ignore[arg-type]
    objective.update_means(Module(), means, {"sums": sums(4.0, 2.0, 1.0)}, "val", 0)  # type: ignore[arg-type]
    found = {name: float(value) for name, value in means.compute().items()}
    assert found == pytest.approx(
        {
            "loss": 2.0, "loss/a": 2.0, "perplexity": math.exp(2), "perplexity/a": math.exp(2), "token_accuracy": 0.5,
        }
    )  # fmt: skip
