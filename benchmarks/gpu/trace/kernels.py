"""Kernels of eager and of compiled code, and the time that each takes on a model of an H200."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import TorchDispatchMode

TFLOPS = {"matmul": 700.0, "float32 matmul": 50.0, "attention": 300.0}
"""10¹² operations per second: bfloat16 products at the sizes of a 7B layer, float32 ones without TF32, and
FlashAttention-2."""
BYTES_PER_SECOND = 0.85 * 4.3e12
DOCUMENT = 512
_MATMULS = {"mm": 0, "addmm": 1, "addmm_": 1, "bmm": 0, "baddbmm": 1}
"""Name of an operation → the index of its left matrix among the arguments."""
_NO_KERNEL = {
    "device",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "detach",
    "_unsafe_view",
    "alias",
    "lift_fresh",
}


class Kernel(NamedTuple):
    """One launch."""

    kind: str
    """A key of `TFLOPS`, or `memory`."""

    flops: float
    """Floating-point operations, if it is a product or attention."""

    bytes: float
    """Bytes read and written."""

    @property
    def seconds(self) -> float:
        """The time by the model of the device."""
        return max(self.flops / (1e12 * TFLOPS.get(self.kind, 1.0)), self.bytes / BYTES_PER_SECOND)


class KernelCounter(TorchDispatchMode):
    """Notes the kernel of every operation of eager code."""

    def __init__(self, found: list[Kernel], config: Any) -> None:
        super().__init__()
        self._found, self._config = found, config

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NO_KERNEL:
            tensors = [each for each in [*args, *(kwargs or {}).values()] if isinstance(each, torch.Tensor)]
            outputs = [
                each for each in (out if isinstance(out, tuple | list) else [out]) if isinstance(each, torch.Tensor)
            ]
            moved = sum(
                min(each.numel() * each.element_size(), each.untyped_storage().nbytes()) for each in tensors + outputs
            )
            self._found.append(_kernel(name, args, moved, self._config))
        return out


def _bytes(value: Any) -> float:
    """Return the bytes of an argument or a result; what is expanded from fewer counts these, and no tensor counts 0."""
    if not isinstance(value, torch.Tensor):
        return 0.0
    return float(min(value.numel() * value.element_size(), value.untyped_storage().nbytes()))


def _kernel(name: str, args: Any, moved: float, config: Any) -> Kernel:
    if name in _MATMULS:
        left, right = args[_MATMULS[name] : _MATMULS[name] + 2]
        kind = "float32 matmul" if left.dtype == torch.float32 else "matmul"
        return Kernel(kind, 2.0 * left.numel() * right.shape[-1], moved)
    if name in ("attention", "attention_backward"):
        query = args[0] if name == "attention" else args[1]
        return attention_kernel(name, query.shape[0], moved, config)
    return Kernel("memory", 0.0, moved)


def attention_kernel(name: str, tokens: int, moved: float, config: Any) -> Kernel:
    """Half of the pairs of a document are masked; the backward pass has two and a half times the operations."""
    flops = 2.0 * tokens * DOCUMENT * config.num_attention_heads * config.head_dim
    return Kernel("attention", flops * (1.0 if name == "attention" else 2.5), moved)


def counting_backend(found: list[Kernel], config: Any, tokens: int) -> Callable[..., Any]:
    """Return inductor, which schedules kernels and notes them instead of generating code."""
    from torch._inductor import compile_fx as module
    from torch._inductor.debug import DebugContext

    def schedule(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        shapes = module.shape_env_from_inputs(inputs)
        fake = module.fake_tensor_prop(gm, inputs)
        module._recursive_record_original_output_strides(gm)
        with V.set_fake_mode(fake):
            module._recursive_post_grad_passes(gm, False)
        graph = GraphLowering(gm, shape_env=shapes)
        with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()), V.set_real_inputs(inputs):
            graph.run(*inputs)
            graph.init_wrapper_code()
            graph._update_scheduler()
            found.extend(_scheduled(graph.scheduler.nodes, config, tokens))
        return module.make_boxed_func(gm.forward)

    return functools.partial(compile_fx, inner_compile=schedule)


def _scheduled(nodes: list[Any], config: Any, tokens: int) -> Iterator[Kernel]:
    """Yield the kernels of a schedule; what only unpacks or joins buffers launches none."""
    for node in nodes:
        moved = float(node.get_read_write_buffers_sizes())
        inner = getattr(node, "node", None)
        if not moved:
            continue
        if (flops := node.estimate_flops()) is not None:
            kind = "float32 matmul" if inner.get_dtype() == torch.float32 else "matmul"
            yield Kernel(kind, float(flops), moved)
        elif "attention" in (name := str(getattr(inner, "python_kernel_name", ""))):
            yield attention_kernel("attention_backward" if "backward" in name else "attention", tokens, moved, config)
        else:
            yield Kernel("memory", 0.0, moved)
