"""Undocumented parts of torch's compiler that we use."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from sft_lightning.compat.names import uses

if TYPE_CHECKING:
    import torch


@uses(
    "torch._dynamo.utils:counters",
    feature="model.torch_compile",
    since="2.0",
    replacement="the messages of TORCH_LOGS=graph_breaks,recompiles",
)
def num_compiled_graphs() -> int:
    """Return how many graphs torch has compiled in this process; 0 shows that `torch.compile` compiles nothing."""
    return int(importlib.import_module("torch._dynamo.utils").counters["stats"]["unique_graphs"])


@uses(
    "torch._dynamo.callback:callback_handler",
    feature="model.torch_compile",
    since="2.4",
    replacement="the messages of TORCH_LOGS=recompiles, which have the times",
)
def watch_compilations(note: Callable[[float], None]) -> None:
    """Report each compilation of this process from now on.

    Args:
        note: Called after a compilation with the seconds that it took.
    """
    handler: Any = importlib.import_module("torch._dynamo.callback").callback_handler
    started = [0.0]

    def start(_: Any) -> None:
        started[0] = time.perf_counter()

    handler.register_start_callback(start)
    handler.register_end_callback(lambda _: note(time.perf_counter() - started[0]))


@uses(
    "torch._dynamo:maybe_mark_dynamic",
    feature="model.torch_compile",
    since="2.1",
    replacement="nothing: the second micro-batch then compiles the layers again",
)
def vary_size(tensor: torch.Tensor, dim: int) -> None:
    """Tell the compiler that each call has another size here, so that it compiles for all sizes at once.

    Args:
        tensor: An argument of what is compiled.
        dim: The dimension.
    """
    importlib.import_module("torch._dynamo").maybe_mark_dynamic(tensor, dim)


@uses(
    "torch._dynamo.exc:TorchDynamoException",
    feature="model.torch_compile",
    since="2.0",
    replacement="`RuntimeError`, which it is derived from",
)
def compile_error() -> type[Exception]:
    """Return the class of the errors of `torch.compile`, those of its backends included."""
    return cast("type[Exception]", importlib.import_module("torch._dynamo.exc").TorchDynamoException)


@uses(
    "torch._functorch:config",
    feature="model.torch_compile",
    since="2.8",
    replacement="not needed once backward passes are compiled before they run",
)
def compile_backward_with_forward() -> None:
    """Patch torch's configuration: a backward pass is compiled with its forward pass, not when it first runs.

    A compilation that fails then does so before anything was computed, when there is still another way. The patch
    stays until the process ends.
    """
    config: Any = importlib.import_module("torch._functorch.config")
    config.force_non_lazy_backward_lowering = True
