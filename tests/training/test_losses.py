from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sft_lightning.batch import Batch, SupervisedPositions
from sft_lightning.training import losses
from sft_lightning.training.losses import (
    Chunks,
    LossSums,
    Targets,
    cross_entropy_sums,
    divide_positions,
    find_targets,
    linear_cross_entropy,
    projected_cross_entropy,
)
from sft_lightning.types import IGNORE_INDEX

X = IGNORE_INDEX
LABELS = torch.tensor([[X, X, 3, 1], [X, 2, X, 4]])
WEIGHTS = torch.tensor([[0, 0, 1.0, 0.5], [0, 2.0, 0, 1.0]])


def batch(labels: torch.Tensor, weights: torch.Tensor) -> Batch:
    found: Any = {"labels": labels, "loss_weights": weights, "supervised": SupervisedPositions(labels)}
    made: Batch = found
    return made


def plain(logits: torch.Tensor, labels: torch.Tensor = LABELS, weights: torch.Tensor = WEIGHTS) -> torch.Tensor:
    """The weighted sum of torch's own cross entropy over all shifted positions."""
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=X)
    return (each * weights[:, 1:].flatten()).sum()


def test_a_token_is_predicted_one_position_before_it() -> None:
    targets = find_targets(batch(LABELS, WEIGHTS))
    assert targets.positions.tolist() == [1, 2, 4, 6]
    assert targets.ids.tolist() == [3, 1, 2, 4]
    assert targets.weights.tolist() == [1.0, 0.5, 2.0, 1.0]
    assert find_targets(batch(torch.full((2, 4), X), torch.zeros(2, 4))).positions.tolist() == []


def test_the_first_token_of_a_row_is_never_predicted_by_the_last_of_the_row_before() -> None:
    labels = torch.tensor([[X, 1], [2, 3]])
    assert find_targets(batch(labels, torch.ones(2, 2))).positions.tolist() == [0, 2]


def test_the_loss_is_the_weighted_sum_of_plain_cross_entropy_in_value_and_gradient() -> None:
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = find_targets(batch(LABELS, WEIGHTS))
    ours = cross_entropy_sums(logits.flatten(0, 1)[targets.positions], targets)
    torch.testing.assert_close(ours.loss, plain(logits))
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours.loss, plain(logits))))
    assert ours.weight.item() == 4.5


def test_accuracy_counts_the_weight_of_tokens_ranked_first() -> None:
    targets = Targets(torch.arange(3), torch.tensor([3, 1, 2]), torch.tensor([1.0, 0.5, 2.0]))
    logits = F.one_hot(torch.tensor([3, 1, 5]), 6).float()
    assert cross_entropy_sums(logits, targets).correct.item() == 1.5
    with torch.no_grad():
        assert linear_cross_entropy(logits, torch.eye(6), None, targets).correct.item() == 1.5


V, D, N = 37, 8, 50


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.nn.Linear, Targets]:
    torch.manual_seed(0)
    targets = Targets(torch.arange(N), torch.randint(V, (N,)), torch.rand(N))
    return torch.randn(N, D, requires_grad=True), torch.nn.Linear(D, V), targets


Problem = tuple[torch.Tensor, torch.nn.Linear, Targets]
Loss = Callable[[torch.Tensor, torch.nn.Linear, Targets], LossSums]


def linear(hidden: torch.Tensor, head: torch.nn.Linear, targets: Targets) -> LossSums:
    return linear_cross_entropy(hidden, head.weight, head.bias, targets)


def projected(hidden: torch.Tensor, head: torch.nn.Linear, targets: Targets) -> LossSums:
    return projected_cross_entropy(hidden, head, targets, V)


@pytest.mark.parametrize("loss", [linear, projected])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_chunks_of_any_size_give_the_value_and_the_gradients_of_the_whole(
    loss: Loss, rows: int, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", rows * V)
    hidden, head, targets = problem
    ours, whole = loss(hidden, head, targets), cross_entropy_sums(head(hidden), targets)
    wanted = [hidden, head.weight, head.bias]
    torch.testing.assert_close(ours.loss, whole.loss, rtol=1e-6, atol=0)
    for found, expected in zip(*(torch.autograd.grad(3 * each.loss, wanted) for each in (ours, whole)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group", [7, 14, 49, 56])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_groups_of_chunks_give_the_value_and_the_gradients_of_the_whole(
    group: int, scale: float, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "divide_positions", lambda *sizes: Chunks(rows=7, group=group))
    hidden, head, targets = problem
    ours = linear_cross_entropy(hidden, head.weight, head.bias, targets, scale=scale, softcap=3.0)
    whole = cross_entropy_sums(3.0 * torch.tanh(scale * head(hidden) / 3.0), targets)
    torch.testing.assert_close(ours.loss, whole.loss, rtol=1e-6, atol=0)
    wanted = [hidden, head.weight, head.bias]
    for found, expected in zip(*(torch.autograd.grad(each.loss, wanted) for each in (ours, whole)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_in_half_precision_fewer_additions_are_no_less_exact(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets = problem
    exact = torch.autograd.grad(linear(hidden, head, targets).loss, head.weight)[0]
    half = copy.deepcopy(head).bfloat16()

    def error(group: int) -> float:
        monkeypatch.setattr(losses, "divide_positions", lambda *sizes: Chunks(5, group))
        loss = linear_cross_entropy(hidden.bfloat16(), half.weight, half.bias, targets).loss
        return float((torch.autograd.grad(loss, half.weight)[0].float() - exact).norm() / exact.norm())

    assert error(25) < 1.1 * error(5) < 0.02


@pytest.mark.parametrize(
    ("vocab_size", "device", "bytes_per_value", "rows", "group"),
    [
        (128256, "cpu", 2, 261, 261),
        (128256, "cuda", 2, 256, 2048),
        (128256, "cuda", 4, 256, 1024),
        (32000, "cuda", 2, 1024, 8192),
        (262208, "cuda", 2, 127, 1016),
        (1 << 26, "cuda", 2, 1, 4),
    ],
)
def test_a_gpus_chunks_are_multiples_of_its_tile_and_added_up_in_groups(
    vocab_size: int, device: str, bytes_per_value: int, rows: int, group: int
) -> None:
    assert divide_positions(vocab_size, device, bytes_per_value) == (rows, group)


def test_a_head_of_128k_tokens_is_predicted_to_lose_less_than_5_percent_of_a_full_step() -> None:
    """Traffic beside the matrix products, for 8 B parameters in bfloat16: about 83 µs per token, 3.66 TB/s."""
    vocabulary, width = 128256, 4096
    group = divide_positions(vocabulary, "cuda", 2).group
    softmax = 44 * vocabulary  # bytes per token: logits, log-probabilities, gradients, each read and written
    addition = (2 + 2 + 4 + 4) * vocabulary * width / group  # the product written and read, the sum read and written
    assert (softmax + addition) / 3.66e12 < 0.05 * 83e-6
    before = (softmax + 12 * vocabulary * width / 261) / 3.66e12
    assert before > 0.09 * 83e-6


@pytest.mark.parametrize(("scale", "softcap"), [(0.5, None), (1.0, 2.0), (2.0, 5.0)])
def test_a_scaled_and_capped_head_has_the_gradients_of_autograd(
    scale: float, softcap: float | None, problem: Problem
) -> None:
    hidden, head, targets = problem
    logits = head(hidden) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    whole = cross_entropy_sums(logits, targets)
    ours = linear_cross_entropy(hidden, head.weight, head.bias, targets, scale=scale, softcap=softcap)
    torch.testing.assert_close(ours.loss, whole.loss)
    for found, expected in zip(
        *(torch.autograd.grad(each.loss, [hidden, head.weight, head.bias]) for each in (ours, whole)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_but_the_hidden_states_do(problem: Problem) -> None:
    hidden, head, targets = problem
    head.requires_grad_(False)
    [found] = torch.autograd.grad(linear(hidden, head, targets).loss, [hidden])
    [expected] = torch.autograd.grad(cross_entropy_sums(head(hidden), targets).loss, [hidden])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_tied_embedding_gets_the_sum_of_the_gradients_of_both_ends() -> None:
    torch.manual_seed(0)
    embedding = torch.nn.Parameter(torch.randn(V, D))
    ids = torch.randint(V, (N,))
    targets = Targets(torch.arange(N), ids.roll(-1), torch.ones(N))
    ours = linear_cross_entropy(embedding[ids], embedding, None, targets).loss
    whole = cross_entropy_sums(embedding[ids] @ embedding.T, targets).loss
    torch.testing.assert_close(*(torch.autograd.grad(each, embedding)[0] for each in (ours, whole)))


@pytest.mark.parametrize("loss", [linear, projected])
def test_without_supervised_tokens_the_loss_is_zero_and_still_has_a_backward_pass(loss: Loss, problem: Problem) -> None:
    _, head, _ = problem
    hidden = torch.randn(0, D, requires_grad=True)
    nothing = loss(hidden, head, Targets(*(torch.zeros(0, dtype=torch.long),) * 2, torch.zeros(0)))
    assert (nothing.loss.item(), nothing.weight.item(), nothing.correct.item()) == (0, 0, 0)
    nothing.loss.backward()
    assert head.weight.grad is None or head.weight.grad.abs().sum() == 0


def test_half_precision_is_summed_in_float32_and_gradients_keep_their_type(problem: Problem) -> None:
    hidden, head, targets = problem
    half = hidden.detach().bfloat16().requires_grad_()
    head.bfloat16()
    ours = linear(half, head, targets)
    assert ours.loss.dtype == torch.float32
    ours.loss.backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    whole = cross_entropy_sums(head(half), targets)
    torch.testing.assert_close(ours.loss, whole.loss, rtol=1e-3, atol=0)


def test_under_autocast_the_head_computes_in_half_precision_and_trains_in_float32(problem: Problem) -> None:
    hidden, head, targets = problem
    with torch.autocast("cpu", torch.bfloat16):
        ours, whole = linear(hidden, head, targets), cross_entropy_sums(head(hidden), targets)
    torch.testing.assert_close(ours.loss, whole.loss, rtol=1e-3, atol=0)
    ours.loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32


def test_the_logits_of_all_positions_never_exist_at_once(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets = problem
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 5 * V)
    seen: list[int] = []
    original = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append(len(x)) or original(x, *rest))
    linear(hidden, head, targets).loss.backward()
    assert seen == [5] * 10
