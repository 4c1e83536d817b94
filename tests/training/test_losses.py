from __future__ import annotations

import torch
import torch.nn.functional as F

from sft_lightning.training.losses import predicting_columns, weighted_cross_entropy
from sft_lightning.types import IGNORE_INDEX

X = IGNORE_INDEX
LABELS = torch.tensor([[X, X, 3, 1], [X, 2, X, 4]])
WEIGHTS = torch.tensor([[0, 0, 1.0, 0.5], [0, 2.0, 0, 1.0]])


def sums(logits: torch.Tensor, labels: torch.Tensor = LABELS, weights: torch.Tensor = WEIGHTS):  # type: ignore[no-untyped-def]
    columns = predicting_columns(labels)
    return weighted_cross_entropy(logits[:, columns], columns, labels, weights)


def test_a_token_is_predicted_one_position_before_it() -> None:
    assert predicting_columns(LABELS).tolist() == [0, 1, 2]
    assert predicting_columns(torch.full((2, 4), X)).tolist() == []


def test_the_loss_is_the_weighted_sum_of_plain_cross_entropy_in_value_and_gradient() -> None:
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ours = sums(logits)
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), reduction="none", ignore_index=X)
    expected = (plain * WEIGHTS[:, 1:].flatten()).sum()
    torch.testing.assert_close(ours.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(ours.loss, logits)[0], torch.autograd.grad(expected, logits)[0])
    assert ours.weight.item() == 4.5


def test_accuracy_counts_the_weight_of_tokens_ranked_first() -> None:
    logits = torch.zeros(2, 4, 6)
    logits[0, 1, 3] = logits[1, 0, 5] = 1.0
    logits[0, 2, 1] = logits[1, 2, 0] = 1.0
    assert sums(logits).correct.item() == 1.5


def test_a_micro_batch_without_supervised_tokens_has_a_loss_of_zero_with_a_gradient() -> None:
    logits = torch.randn(2, 4, 6, requires_grad=True)
    nothing = sums(logits, torch.full((2, 4), X), torch.zeros(2, 4))
    assert (nothing.loss.item(), nothing.weight.item(), nothing.correct.item()) == (0, 0, 0)
    assert torch.autograd.grad(nothing.loss, logits)[0].abs().sum() == 0


def test_half_precision_logits_are_summed_in_float32() -> None:
    assert sums(torch.randn(2, 4, 6).bfloat16()).loss.dtype == torch.float32
