"""Simulate a micro-batch of training on fake tensors, and count what it allocates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.optim import Optimizer

from sft_lightning.compat.torch import dropout_replaced_by, forward_replaced_by
from sft_lightning.models.checkpointing import Recomputation
from sft_lightning.training.losses import Targets, linear_cross_entropy, projected_log_probs
from sft_lightning.training.memory.skeleton import Skeleton, recomputing
from sft_lightning.training.memory.tracker import StorageTracker
from sft_lightning.training.optim import build_optimizer

Device = Literal["cuda", "cpu"]
"""The device that is imitated: its dropout, and bitsandbytes' kernels, keep and copy other tensors."""


@dataclass(frozen=True)
class SimulatedStep:
    """Bytes of a micro-batch, without weights."""

    kept: int
    """Tensors that the forward pass keeps for the backward pass, and the gradient of the head's input."""

    peak: int
    """Largest number of bytes alive at once; includes gradients unless they existed before."""


def simulate_step(
    skeleton: Skeleton,
    *,
    batch_size: int,
    max_length: int,
    recomputation: Recomputation,
    precision: str = "32-true",
    has_gradients: bool = False,
    int8: bool = False,
    of_pairs: bool = False,
    device: Device = "cuda",
) -> SimulatedStep:
    """Run a forward and a backward pass on tensors without values.

    Every row is one document and every token is supervised: the largest memory that a micro-batch can take.

    Args:
        skeleton: The model without weights.
        batch_size: Rows.
        max_length: Tokens per row.
        recomputation: What is recomputed in the backward pass.
        precision: `trainer.precision` in its long form, such as `bf16-mixed`.
        has_gradients: Whether gradients of an earlier micro-batch exist already; they are not counted then.
        int8: Whether the frozen linear layers imitate LLM.int8's.
        of_pairs: Whether the loss is that of `task: dpo`.
        device: The device that is imitated.
    """
    layers = int8_layers(skeleton.base, skeleton.linears, device if int8 else None)
    dropout = dropout_replaced_by(_cuda_dropout) if device == "cuda" else nullcontext()
    with skeleton.mode, recomputing(skeleton.base, recomputation), layers, dropout:
        for parameter in skeleton.trainable:
            parameter.grad = torch.zeros_like(parameter) if has_gradients else None
        try:
            autocast = autocast_of(precision)
            return training_step(
                skeleton.model, skeleton.base, batch_size, max_length, autocast, of_pairs=of_pairs, device=device
            )
        finally:
            for parameter in skeleton.trainable:
                parameter.grad = None


def training_step(
    model: torch.nn.Module,
    base: Any,
    batch_size: int,
    max_length: int,
    autocast: AbstractContextManager[Any],
    *,
    of_pairs: bool = False,
    device: Device = "cpu",
) -> SimulatedStep:
    """Run the forward and backward pass of `CausalLMModule`, and count bytes; tensors may be fake or real.

    Args:
        model: The model, adapter included.
        base: The transformers model inside.
        batch_size: Rows.
        max_length: Tokens per row.
        autocast: Context of the forward pass.
        of_pairs: Whether the loss is that of `task: dpo`.
        device: The device whose chunks of positions the head uses.
    """
    known = [*model.parameters(), *model.buffers()]
    known += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with StorageTracker(known) as tracker:
        ids = torch.zeros(batch_size, max_length, dtype=torch.int64)
        positions = torch.arange(max_length).expand(batch_size, -1)
        supervised = torch.arange(batch_size * max_length)
        targets = Targets(supervised, torch.zeros_like(supervised), torch.ones(len(supervised)))
        with autocast:
            out = base.base_model(
                input_ids=ids,
                position_ids=positions,
                document_lengths=[[max_length]] * batch_size,
                use_cache=False,
            )
            hidden = out.last_hidden_state.flatten(0, 1)[supervised]
            del out
            head = base.get_output_embeddings()
            if of_pairs:
                loss = projected_log_probs(hidden, head, targets.ids, len(head.weight)).sum()
            else:
                loss = linear_cross_entropy(hidden, head.weight, head.bias, targets, as_on=device).loss
            del hidden
        kept = tracker.live
        loss.backward()
    return SimulatedStep(kept, tracker.peak)


def autocast_of(precision: str) -> AbstractContextManager[Any]:
    """Return the autocast context of a `trainer.precision` on the CPU."""
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return torch.autocast("cpu", dtypes[precision]) if precision in dtypes else nullcontext()


def fake_optimizer(skeleton: Skeleton, make: Callable[[Any], Optimizer]) -> Optimizer:
    """Make the optimizer over the fake tensors that train.

    Args:
        skeleton: The model without weights.
        make: `model.optimizer`.

    Raises:
        UserError: If the class refuses its arguments.
    """
    try:
        with skeleton.mode:
            return build_optimizer(make, [{"params": skeleton.trainable}])
    except RuntimeError:  # bitsandbytes' 8-bit optimizers read numbers of the tables that they make
        return build_optimizer(make, [{"params": skeleton.trainable}])


def optimizer_bytes(skeleton: Skeleton, optimizer: Optimizer) -> float | None:
    """Return the bytes of the optimizer's state after a step on fake gradients.

    Args:
        skeleton: The model without weights.
        optimizer: From `fake_optimizer`.

    Returns:
        `None` if the optimizer cannot step on fake tensors, because it reads their values.
    """
    for group in optimizer.param_groups:
        group |= {key: False for key in ("fused", "foreach") if key in group}
    with skeleton.mode:
        for parameter in skeleton.trainable:
            parameter.grad = torch.zeros_like(parameter)
        try:
            optimizer.step()
        except (RuntimeError, TypeError, NotImplementedError, AttributeError):
            return None
        finally:
            for parameter in skeleton.trainable:
                parameter.grad = None
        tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _cuda_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Dropout that keeps what it keeps on a GPU: a mask of one byte per value. On the CPU it is of the input's type."""
    return torch.native_dropout(input, p, training)[0] if training and p else input


class _Int8Linear(torch.autograd.Function):
    """A linear layer for fake tensors that allocates what LLM.int8's does.

    bitsandbytes keeps the input of every layer on the autograd context itself, out of reach of gradient checkpointing,
    and makes full copies (0.50, `bitsandbytes/autograd/_functions.py`): MatMul8bitLt on CUDA of the inputs and outputs,
    MatMul8bitFp on the CPU of the weight, which it unpacks.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kernel: str) -> Any:
        ctx.x, ctx.weight = x, weight
        if kernel == "cpu":
            return F.linear(x, _unpacked(weight, x.dtype), bias)
        flat = x.reshape(-1, x.shape[-1])
        half = flat.to(torch.float16)
        codes = torch.empty_like(half, dtype=torch.int8)
        del half
        sums = torch.empty(len(flat), len(weight), dtype=torch.int32, device=x.device)
        out = torch.mm(
            flat, flat.new_empty(1, 1).expand(flat.shape[1], len(weight))
        )  # selective recomputation keeps it
        del codes, sums
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [grad] = grads
        flat = grad.reshape(-1, grad.shape[-1]).to(ctx.x.dtype)
        return (flat @ _unpacked(ctx.weight, ctx.x.dtype)).view(ctx.x.shape), None, None, None


def _unpacked(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(weight, dtype=dtype)


@contextmanager
def int8_layers(model: torch.nn.Module, linears: Collection[int], kernel: Device | None) -> Iterator[None]:
    """Make linear layers allocate what LLM.int8's do while the context is open.

    Args:
        model: A model of fake tensors.
        linears: `id` of the weights that are quantized.
        kernel: Device whose kernels are imitated; `None` leaves the layers as they are.
    """
    if kernel is None:
        yield
        return
    layers = [each for each in model.modules() if isinstance(each, torch.nn.Linear) and id(each.weight) in linears]
    with ExitStack() as patches:
        for layer in layers:
            patches.enter_context(forward_replaced_by(layer, functools.partial(_forward, layer, kernel)))
        yield


def _forward(layer: torch.nn.Linear, kernel: Device, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _Int8Linear.apply(x, layer.weight, layer.bias, kernel)  # type: ignore[no-untyped-call]
    return out
