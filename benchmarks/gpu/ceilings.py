"""What the device reaches at single operations: matrix products, copies, attention, the head of a large vocabulary."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.clock import Answer
from benchmarks.gpu.inputs import SHAPES
from sft_lightning.training.losses import Targets, linear_cross_entropy


def seconds_of(action: Callable[[], Any], device: torch.device, *, repeats: int) -> float:
    """Return the seconds that an action takes on the device, the best of some runs after one more.

    Args:
        action: Called without arguments.
        device: Where it runs.
        repeats: Timed runs.
    """
    action()
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            torch.cuda.synchronize(device)
            found.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            action()
            found.append(time.perf_counter() - began)
    return min(found)


def ceiling(cell: Cell, device: torch.device, *, repeats: int) -> Answer:
    """Measure what the cell names.

    Args:
        cell: A cell of kind `ceiling`; of the toy shape, all sizes are small.
        device: Where to measure.
        repeats: Timed runs of each operation.
    """
    measure = {
        "ceiling-matmul": _matmul, "ceiling-copy": _copy, "ceiling-attention": _attention,
        "ceiling-head-128k": _head,
    }[cell.name]  # fmt: skip
    return measure(cell, device, repeats)


def _randn(*shape: int, device: torch.device, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16, requires_grad=grad)


def _matmul(cell: Cell, device: torch.device, repeats: int) -> Answer:
    """Products of bfloat16 matrices, in 10¹² operations per second: a large square, and those of a decoder layer."""
    shape = SHAPES[cell.shape]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    tokens = cell.batch_size * cell.max_length
    side = 2 * hidden
    sizes = {
        "square": (side, side, side), "attention": (tokens, hidden, hidden), "up": (tokens, hidden, inner),
        "down": (tokens, inner, hidden), "adapter": (tokens, hidden, 16),
    }  # fmt: skip
    found: Answer = {}
    for name, (m, k, n) in sizes.items():
        a, b = _randn(m, k, device=device), _randn(k, n, device=device)
        found[f"{name}_tflops"] = 2e-12 * m * k * n / seconds_of(lambda a=a, b=b: a @ b, device, repeats=repeats)
    return found


def _copy(cell: Cell, device: torch.device, repeats: int) -> Answer:
    """Bytes read and written per second by a copy, in 10¹²."""
    size = 2**29 if cell.shape != "toy" else 2**16
    source = torch.zeros(size, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device, repeats=repeats)
    return {"terabytes_per_second": 2 * 2 * size / seconds / 1e12}


def _attention(cell: Cell, device: torch.device, repeats: int) -> Answer:
    """Forward and backward pass of torch's causal attention, in 10¹² operations per second, by the documents' length.

    A forward pass has 4·s·d operations per token and head, half of them masked; the backward pass two and a half times
    as many. Documents of one length are a batch, so this needs no kernel for packed rows.
    """
    shape = SHAPES[cell.shape]
    heads = shape["num_attention_heads"]
    width = shape["hidden_size"] // heads
    tokens = cell.batch_size * cell.max_length
    found: Answer = {}
    for length in (cell.max_length // 8, cell.max_length):
        q, k, v = (_randn(tokens // length, heads, length, width, device=device, grad=True) for _ in range(3))

        def run(q: Any = q, k: Any = k, v: Any = v) -> None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            out.backward(torch.ones_like(out))

        operations = 3.5 * 2 * tokens * length * heads * width
        found[f"documents_of_{length}_tflops"] = 1e-12 * operations / seconds_of(run, device, repeats=repeats)
    return found


def _head(cell: Cell, device: torch.device, repeats: int) -> Answer:
    """Loss and gradients of a trained head, in microseconds per token, beside the three products alone."""
    shape = SHAPES[cell.shape]
    tokens = cell.batch_size * cell.max_length // 2
    hidden = _randn(tokens, shape["hidden_size"], device=device, grad=True)
    weight = _randn(shape["vocab_size"], shape["hidden_size"], device=device, grad=True)
    ids = torch.randint(shape["vocab_size"], (tokens,), device=device)
    targets = Targets(torch.arange(tokens, device=device), ids, torch.ones(tokens, device=device))

    def run() -> None:
        linear_cross_entropy(hidden, weight, None, targets).loss.backward()

    seconds = seconds_of(run, device, repeats=repeats)
    part, slope = hidden.detach()[:1024], _randn(min(tokens, 1024), shape["vocab_size"], device=device)

    def products() -> None:
        F.linear(part, weight.detach())
        slope @ weight.detach()
        slope.T @ part

    alone = seconds_of(products, device, repeats=repeats) / len(part)
    return {"microseconds_per_token": 1e6 * seconds / tokens, "products_microseconds_per_token": 1e6 * alone}
