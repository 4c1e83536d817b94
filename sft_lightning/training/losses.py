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

GROUP_BYTES = 1 << 29
"""Bytes of the logits' gradients that a GPU collects before it adds a product of them to the gradient of the head."""

_TILE = 128
"""Rows that a GPU's matrix product computes at once: a chunk of 261 rows takes the time of 384."""


class Chunks(NamedTuple):
    """How the head's positions are divided."""

    rows: int
    """Positions whose logits exist at once."""

    group: int
    """Positions between two additions to the gradient of the head's weight; a multiple of `rows`."""


def divide_positions(vocab_size: int, device: str, bytes_per_value: int = 4) -> Chunks:
    """Return how the head's positions are divided into chunks.

    With 128k tokens in the vocabulary, 4096 values per position, and bfloat16, each addition to the gradient of the
    head's weight reads and writes 6.3 GB: for each of 256 positions that is 25 MB, for each of 2048 it is 3 MB. The
    CPU adds after every chunk.

    Args:
        vocab_size: V.
        device: Type of the device: `cpu`, `cuda`.
        bytes_per_value: Bytes of a value of the head's weight.
    """
    rows = max(1, CHUNK_LOGITS // vocab_size)
    if device == "cpu":
        return Chunks(rows, rows)
    if rows > _TILE:
        rows -= rows % _TILE
    return Chunks(rows, rows * max(1, GROUP_BYTES // (rows * vocab_size * bytes_per_value)))


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

    rows = divide_positions(vocab_size, hidden.device.type).rows
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
    as_on: str | None = None,
) -> LossSums:
    """Sum the weighted cross entropy of hidden states under a linear head; its logits are neither kept nor recomputed.

    Args:
        hidden: Hidden states at `targets.positions`, (N, D).
        weight: The head's weight, (V, D).
        bias: The head's bias, (V,); `None` if it has none.
        targets: The supervised tokens.
        scale: Factor on the head's output.
        softcap: Bound of the logits, applied with a tanh; `None` for no bound.
        as_on: Type of the device whose chunks are used; `None` for the one that computes.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    hidden = hidden.to(weight.dtype)  # the head may train in float32 above a base in half precision
    head = _Head(scale, softcap, divide_positions(len(weight), as_on or device, weight.element_size()))
    loss, correct = _LinearCrossEntropy.apply(hidden, weight, bias, targets, head, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
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

    rows = divide_positions(vocab_size, hidden.device.type).rows
    parts = zip(hidden.split(rows), ids.split(rows), strict=True)
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])


class _Head(NamedTuple):
    """What happens to the head's output, and how it is divided; see `linear_cross_entropy`."""

    scale: float
    softcap: float | None
    chunks: Chunks


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients of each chunk in the forward pass, from its logits; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: Targets,
        head: _Head,
        with_gradients: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        # Sums over chunks are kept in float32: in half precision, each chunk would round them once more.
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        correct = torch.zeros_like(loss)
        rows, group = head.chunks
        step = group if wanted[1] else rows
        shape = (min(step, len(hidden)), len(weight))
        collected = hidden.new_empty(shape, dtype=weight.dtype) if shape[0] > rows else None
        for start in range(0, len(hidden), step):
            block = slice(start, min(start + step, len(hidden)))
            slope = collected if collected is None else collected[: block.stop - start]
            for first in range(start, block.stop, rows):
                part = slice(first, min(first + rows, block.stop))
                chunk = Targets(*(column[part] for column in targets))
                log_p, squashed = _log_probs(F.linear(hidden[part], weight, bias).float(), head)
                loss -= (log_p.gather(1, chunk.ids[:, None]).squeeze(1) * chunk.weights).sum()
                if not any(wanted):
                    correct += _correct(log_p, chunk)
                elif slope is None or collected is None:
                    slope = _slope(log_p, squashed, chunk, head).to(weight.dtype)
                else:
                    slope[first - start : part.stop - start] = _slope(log_p, squashed, chunk, head)
            if slope is None:
                continue
            if of_hidden is not None:
                of_hidden[block] = slope @ weight
            if of_weight is not None and weight.dtype == torch.float32:
                of_weight.addmm_(slope.T, hidden[block])
            elif of_weight is not None:
                of_weight += slope.T @ hidden[block]
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
            # In place: a copy would be the largest tensor of the step.
            None if of_weight is None else of_weight.mul_(of_loss).to(ctx.dtypes[0]),
            None if of_bias is None else (of_bias * of_loss).to(ctx.dtypes[1]),
            None,
            None,
            None,
        )


def _log_probs(logits: torch.Tensor, head: _Head) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return log-probabilities, float32 (n, V), and the tanh of the bounded logits; changes `logits`."""
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is None:
        return F.log_softmax(logits, dim=-1), None
    squashed = torch.tanh(logits / head.softcap)
    return F.log_softmax(squashed * head.softcap, dim=-1), squashed


def _slope(log_p: torch.Tensor, squashed: torch.Tensor | None, targets: Targets, head: _Head) -> torch.Tensor:
    """Return the gradient of the loss with respect to the head's output, float32 (n, V); changes `log_p`."""
    slope = log_p.exp_()
    index = targets.ids[:, None]
    slope.scatter_add_(1, index, -torch.ones_like(index, dtype=slope.dtype)).mul_(targets.weights[:, None])
    if squashed is not None:
        slope *= 1 - squashed**2
    return slope * head.scale if head.scale != 1.0 else slope


@torch.no_grad()
def _correct(scores: torch.Tensor, targets: Targets) -> torch.Tensor:
    if not len(targets.ids):
        return targets.weights.sum()
    return ((scores.argmax(-1) == targets.ids) * targets.weights).sum()
