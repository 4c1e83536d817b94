"""Token-weighted cross entropy over supervised tokens.

A token is predicted at the position before it. Logits are computed only at these positions, in chunks of a few hundred,
and each chunk is turned into gradients at once. The (tokens × vocabulary) matrix of logits never exists, so the head's
memory does not grow with the length of the rows (as in Wijmans et al., 2024, arXiv:2411.09009, and Liger-Kernel, Hsu et
al., 2024, arXiv:2410.10989). Everything after the head is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from sft_lightning.batch import Batch

CHUNK_LOGITS = 1 << 25
"""Number of logits in a chunk: 128 MiB in float32."""


class LossSums(NamedTuple):
    """Sums over a micro-batch's supervised tokens, float32 scalars."""

    loss: torch.Tensor
    """Σ weight · cross entropy, in nats."""

    weight: torch.Tensor
    """Σ weight."""

    correct: torch.Tensor
    """Σ weight over the tokens to which the model gives the highest logit; computed only without gradients."""


class Targets(NamedTuple):
    """The supervised tokens of a micro-batch."""

    positions: torch.Tensor
    """Positions that predict the tokens, each one before its token, in the flattened (B · S) micro-batch, (N,)."""

    ids: torch.Tensor
    """Token ids, (N,)."""

    weights: torch.Tensor
    """Loss weights, float32, (N,)."""


def find_targets(batch: Batch) -> Targets:
    """Return the supervised tokens of a micro-batch, and the positions that predict them; waits for no device.

    Args:
        batch: Packed rows.
    """
    positions = batch["supervised"].flat
    return Targets(
        positions, batch["labels"].flatten()[positions + 1], batch["loss_weights"].flatten()[positions + 1].float()
    )


def cross_entropy_sums(logits: torch.Tensor, targets: Targets) -> LossSums:
    """Sum the weighted cross entropy of logits.

    Args:
        logits: Logits at `targets.positions`, (N, V).
        targets: The supervised tokens.
    """
    scores = logits.float()
    losses = F.cross_entropy(scores, targets.ids, reduction="none")
    # Without supervised tokens `losses` is empty, and its sum still has a graph: every rank has a backward pass.
    return LossSums((losses * targets.weights).sum(), targets.weights.sum(), _correct(scores, targets))


def projected_cross_entropy(
    hidden: torch.Tensor, project: Callable[[torch.Tensor], torch.Tensor], targets: Targets, vocab_size: int
) -> LossSums:
    """Sum the weighted cross entropy of hidden states under any head; the backward pass computes its logits again.

    Args:
        hidden: Hidden states at `targets.positions`, (N, D).
        project: The head, (n, D) → logits (n, V).
        targets: The supervised tokens.
        vocab_size: V.
    """

    def sums(part: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(cross_entropy_sums(project(part), Targets(ids, ids, weights)))

    rows = max(1, CHUNK_LOGITS // vocab_size)
    parts = zip(hidden.split(rows), targets.ids.split(rows), targets.weights.split(rows), strict=True)
    chunks = [checkpoint(sums, *part, use_reentrant=False) for part in parts]
    return LossSums(*(torch.stack(column).sum() for column in zip(*chunks, strict=True)))


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: Targets,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> LossSums:
    """Sum the weighted cross entropy of hidden states under a linear head; its logits are neither kept nor recomputed.

    Args:
        hidden: Hidden states at `targets.positions`, (N, D).
        weight: The head's weight, (V, D).
        bias: The head's bias, (V,); `None` if it has none.
        targets: The supervised tokens.
        scale: Factor on the head's output.
        softcap: Bound of the logits, applied with a tanh; `None` for no bound.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    hidden = hidden.to(weight.dtype)  # the head may train in float32 above a base in half precision
    loss, correct = _LinearCrossEntropy.apply(hidden, weight, bias, targets, scale, softcap, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return LossSums(loss, targets.weights.sum(), correct)


def log_probs_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each token, (N,) float32, in nats.

    Args:
        logits: Logits at the positions that predict the tokens, (N, V).
        ids: Token ids, (N,).
    """
    return -F.cross_entropy(logits.float(), ids, reduction="none")


def projected_log_probs(
    hidden: torch.Tensor, project: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Return the log-probability of each token under any head, (N,) float32, in nats.

    The gradient of a loss on whole answers is known only when all tokens of an answer are, so the backward pass
    computes each chunk's logits again.

    Args:
        hidden: Hidden states at the positions that predict the tokens, (N, D).
        project: The head, (n, D) → logits (n, V).
        ids: Token ids, (N,).
        vocab_size: V.
    """

    def chunk(part: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return log_probs_of(project(part), ids)

    rows = max(1, CHUNK_LOGITS // vocab_size)
    parts = zip(hidden.split(rows), ids.split(rows), strict=True)
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients of each chunk in the forward pass, from its logits; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: Targets,
        scale: float,
        softcap: float | None,
        with_gradients: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        # Sums over chunks are kept in float32: in half precision, each chunk would round them once more.
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        correct = torch.zeros_like(loss)
        rows = max(1, CHUNK_LOGITS // len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            chunk = Targets(*(column[part] for column in targets))
            logits = F.linear(hidden[part], weight, bias).float()
            if scale != 1.0:
                logits *= scale
            squashed = None
            if softcap is not None:
                squashed = torch.tanh(logits / softcap)
                logits = squashed * softcap
            log_p = F.log_softmax(logits, dim=-1)
            index = chunk.ids[:, None]
            loss -= (log_p.gather(1, index).squeeze(1) * chunk.weights).sum()
            if not any(wanted):
                correct += _correct(log_p, chunk)
                continue
            slope = log_p.exp_()
            slope.scatter_add_(1, index, -torch.ones_like(index, dtype=slope.dtype)).mul_(chunk.weights[:, None])
            if squashed is not None:
                slope *= 1 - squashed**2
            slope = (slope * scale if scale != 1.0 else slope).to(weight.dtype)
            if of_hidden is not None:
                of_hidden[part] = slope @ weight
            if of_weight is not None and weight.dtype == torch.float32:
                of_weight.addmm_(slope.T, hidden[part])
            elif of_weight is not None:
                of_weight += slope.T @ hidden[part]
            if of_bias is not None:
                of_bias += slope.sum(0, dtype=torch.float32)
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_hidden, of_weight, of_bias = ctx.saved_tensors
        return (
            None if of_hidden is None else of_hidden * of_loss.to(of_hidden.dtype),
            None if of_weight is None else (of_weight * of_loss).to(ctx.dtypes[0]),
            None if of_bias is None else (of_bias * of_loss).to(ctx.dtypes[1]),
            None,
            None,
            None,
            None,
        )


@torch.no_grad()
def _correct(scores: torch.Tensor, targets: Targets) -> torch.Tensor:
    if not len(targets.ids):
        return targets.weights.sum()
    return ((scores.argmax(-1) == targets.ids) * targets.weights).sum()
