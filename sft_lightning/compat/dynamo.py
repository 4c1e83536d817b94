"""Undocumented parts of torch's compiler that we use."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
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


@uses(
    "torch._ops:OpOverload",
    attributes=("_schema",),
    feature="model.gradient_checkpointing: selective",
    since="2.4",
    replacement="a table of the position of `dropout_p` in the operations of each release",
)
def argument_of(operation: torch._ops.OpOverload, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the value of an argument in a call of an operation; `None` if the operation does not have it.

    Args:
        operation: What was called.
        name: The argument's name.
        args: Positional arguments of the call.
        kwargs: Named arguments of the call.
    """
    for position, argument in enumerate(operation._schema.arguments):
        if argument.name == name:
            return args[position] if position < len(args) else kwargs.get(name, argument.default_value)
    return None


@uses(
    "torch._ops:OpOverload",
    attributes=("_schema",),
    feature="model.gradient_checkpointing: selective",
    since="2.4",
    replacement="the names of operations, of which those that change a tensor end in `_`",
)
def changed_tensors(operation: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments that a call of an operation changes in place.

    Args:
        operation: What is called.
        args: Positional arguments of the call.
        kwargs: Named arguments of the call.
    """
    written = [
        (position, argument.name)
        for position, argument in enumerate(operation._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [args[position] if position < len(args) else kwargs.get(name) for position, name in written]


@uses(
    "torch.utils._python_dispatch:TorchDispatchMode.__torch_dispatch__",
    feature="model.gradient_checkpointing: selective",
    since="2.0",
    replacement="`watching_operations`, which does not tell which operation made a tensor",
)
def calling_operations(call: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> AbstractContextManager[Any]:
    """Return a context in which a function is called in place of every operation.

    Args:
        call: Takes the operation, its positional and its named arguments; returns what the operation returns.
    """
    base: Any = importlib.import_module("torch.utils._python_dispatch").TorchDispatchMode

    class Calling(base):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return call(func, args, kwargs or {})

    return cast("AbstractContextManager[Any]", Calling())
