"""A decoder layer and the head, traced on tensors without values, with the attention that a GPU takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers import AutoConfig

from benchmarks.gpu.inputs import SHAPES
from benchmarks.gpu.trace.kernels import DOCUMENT, Kernel, KernelCounter, counting_backend
from sft_lightning.batch import DocumentLengths
from sft_lightning.compat.torch import fake_tensor_mode, storage_key
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.attention import paths
from sft_lightning.models.attention.kernels import KERNELS
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.models.base.building import build_model
from sft_lightning.models.compiling import compile_layers
from sft_lightning.training.losses import Targets, linear_cross_entropy
from sft_lightning.training.memory.skeleton import _make_fake


class Variant(NamedTuple):
    """One way of training a layer."""

    compiled: bool = False
    """Whether the layer is compiled."""

    adapter: bool = True
    """LoRA of rank 16, or full fine-tuning."""

    dropout: float = 0.0
    """Dropout of the adapter."""

    mixed: bool = False
    """Under `bf16-mixed`, or in the types of the weights."""

    dtype: torch.dtype = torch.bfloat16
    """Type of the base's weights."""

    fused: bool = True
    """Our LoRA function, or PEFT's own forward pass."""


VARIANTS: dict[str, Variant] = {
    "LoRA, PEFT's forward, dropout 0.05": Variant(dropout=0.05, fused=False),
    "LoRA, PEFT's forward": Variant(fused=False),
    "LoRA, dropout 0.05": Variant(dropout=0.05),
    "LoRA": Variant(),
    "LoRA, bf16-mixed": Variant(mixed=True),
    "LoRA, compiled": Variant(compiled=True),
    "LoRA, bf16-mixed, compiled": Variant(mixed=True, compiled=True),
    "full, bfloat16": Variant(adapter=False),
    "full, bfloat16, compiled": Variant(adapter=False, compiled=True),
    "full, float32 with bf16-mixed": Variant(adapter=False, mixed=True, dtype=torch.float32),
    "full, float32 with bf16-mixed, compiled": Variant(adapter=False, mixed=True, dtype=torch.float32, compiled=True),
}


class Figures(NamedTuple):
    """What a trace says of a layer."""

    kernels: int
    """Launches of a forward and a backward pass."""

    products: int
    """Matrix products among them."""

    float32_matmuls: int
    """Matrix products in float32, which are about ten times slower."""

    saved_mb: float
    """10⁶ bytes per token that all layers keep for the backward pass."""

    moved_mb: float
    """10⁶ bytes per token and layer that kernels other than products and attention read and write."""

    tokens_per_second: float
    """Predicted for the full model: all layers and the head."""


@torch.library.custom_op("benchmarks::attention", mutates_args=())
def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands for a variable-length kernel: what it returns, without values."""
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op("benchmarks::attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log_sums: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stands for its backward pass."""
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


_attention.register_fake(lambda q, k, v: (torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)))
_attention_backward.register_fake(
    lambda grad, q, k, v, out, sums: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
)
_attention.register_autograd(
    lambda ctx, grad, _: _attention_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


@contextmanager
def as_on_a_gpu(head_dim: int) -> Iterator[None]:
    """Let packed attention take the path of a GPU, with a kernel that returns tensors without values."""
    path = paths.AttentionPath("torch", "traced", head_dim)
    kernel = {"torch": lambda q, k, v, documents, **options: _attention(q, k, v)[0]}
    with mock.patch.object(paths, "_decided", return_value=path), mock.patch.dict(KERNELS, kernel):
        yield


def trace(variant: Variant, *, tokens: int = 16384, shape: str = "7b") -> Figures:
    """Trace one decoder layer and the head, and predict the full model's speed.

    Args:
        variant: How it trains.
        tokens: Tokens of a micro-step, in documents of 512.
        shape: Key of `inputs.SHAPES`.
    """
    config = AutoConfig.for_model(**{**SHAPES[shape], "num_hidden_layers": 1})
    num_layers = SHAPES[shape]["num_hidden_layers"]
    base, mode = _fake_model(variant, config)
    kernels: list[Kernel] = []
    saved: dict[int, int] = {}
    weights = {storage_key(each.untyped_storage()) for each in [*base.parameters(), *base.buffers()]}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage_key(storage) not in weights:
            saved[storage_key(storage)] = storage.nbytes()
        return tensor

    with as_on_a_gpu(config.head_dim), mode:
        if variant.compiled:
            torch.compiler.reset()
            compile_layers(base, lambda line: None, backend=counting_backend(kernels, config, tokens))
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=variant.mixed)
        # torch compiles nothing inside a mode like the counter's.
        counter = nullcontext() if variant.compiled else KernelCounter(kernels, config)
        dtype = torch.float32 if variant.mixed and variant.dtype == torch.float32 else torch.bfloat16
        hidden = torch.randn(1, tokens, config.hidden_size, dtype=dtype).requires_grad_()
        positions = torch.arange(tokens)[None]
        with autocast:
            rotary = base.model.rotary_emb(hidden, positions)
            documents = DocumentLengths([[DOCUMENT] * (tokens // DOCUMENT)])
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter:
                out = base.model.layers[0](hidden, position_embeddings=rotary, document_lengths=documents)
        with counter:
            out.backward(torch.ones_like(out))
        head = _trace_head(base, hidden, variant)
    return _figures(kernels, head, sum(saved.values()), tokens=tokens, num_layers=num_layers)


def _fake_model(variant: Variant, config: Any) -> tuple[Any, Any]:
    """Return a model of one layer without values, an adapter inside it, and its mode."""
    with torch.device("meta"):
        base = build_model(config, None, dtype=variant.dtype, attn_implementation=PACKED).train()
        if variant.adapter:
            fuse = "sft_lightning.models.adapters.wrapping.fuse_lora"
            with nullcontext() if variant.fused else mock.patch(fuse):
                add_adapter(base, AdapterConfig(r=16, dropout=variant.dropout))
    mode = fake_tensor_mode()
    _make_fake(base, mode)
    return base, mode


def _trace_head(base: Any, hidden: torch.Tensor, variant: Variant) -> list[Kernel]:
    """Return the kernels of the loss at every token, forward and backward."""
    found: list[Kernel] = []
    rows = hidden.detach().to(torch.bfloat16).flatten(0, 1).requires_grad_()
    ids = torch.zeros(len(rows), dtype=torch.int64)
    targets = Targets(torch.arange(len(rows)), ids, torch.ones(len(rows)))
    weight = base.lm_head.weight.detach().to(torch.bfloat16).requires_grad_(not variant.adapter)
    with KernelCounter(found, base.config):
        linear_cross_entropy(rows, weight, None, targets, as_on="cuda").loss.backward()
    return found


def _figures(layer: list[Kernel], head: list[Kernel], saved: int, *, tokens: int, num_layers: int) -> Figures:
    products = [kernel for kernel in layer if "matmul" in kernel.kind]
    seconds = num_layers * sum(kernel.seconds for kernel in layer) + sum(kernel.seconds for kernel in head)
    return Figures(
        kernels=len(layer),
        products=len(products),
        float32_matmuls=sum(kernel.kind == "float32 matmul" for kernel in products),
        saved_mb=num_layers * saved / tokens / 1e6,
        moved_mb=sum(kernel.bytes for kernel in layer if kernel.kind == "memory") / tokens / 1e6,
        tokens_per_second=tokens / seconds,
    )
