"""What is used of torch beyond its documented interface."""

from __future__ import annotations

import copy
import importlib
import inspect
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, cast

from sft_lightning.compat.names import uses

if TYPE_CHECKING:
    import torch


@uses(
    "torch.amp:GradScaler.get_scale",
    attributes=("_scale", "_init_scale"),
    feature="trainer.precision: 16-mixed",
    since="2.3",
    replacement="`get_scale`, which waits for the device",
)
def loss_scale(scaler: torch.amp.GradScaler) -> tuple[torch.Tensor | None, float]:
    """Return the scale of the loss without waiting for the device.

    Returns:
        The scale, a float32 scalar that the scaler changes in place, `None` before the first step; and the scale that
        it began with.
    """
    return scaler._scale, float(scaler._init_scale)


@uses(
    feature="trainer.precision: 16-mixed",
    since="2.0",
    replacement="`optimizer.defaults['fused']`, which decides where the attribute is gone",
)
def unscales_in_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a loss scaler leaves it to the optimizer's step to unscale the gradients, as it does to fused ones.

    The scaler asks the same attribute, which only such optimizers have. Without it, `fused` decides.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", optimizer.defaults.get("fused")))


@uses(
    "torch._subclasses.fake_tensor:FakeTensorMode",
    feature="plan",
    since="2.0",
    replacement="`torch.device('meta')`, whose operations allocate nothing",
)
def fake_tensor_mode() -> Any:
    """Return a context in which tensors have shapes, types and devices, and no memory; real ones may be mixed in."""
    return importlib.import_module("torch._subclasses.fake_tensor").FakeTensorMode(allow_non_fake_inputs=True)


@uses(
    "torch.utils._python_dispatch:TorchDispatchMode.__torch_dispatch__",
    "torch.utils._pytree:tree_map_only",
    feature="plan",
    since="2.0",
    replacement="the documented `torch.overrides.TorchFunctionMode`, which does not see the backward pass",
)
def watching_operations(see: Callable[[torch.Tensor], Any]) -> AbstractContextManager[Any]:
    """Return a context that shows every tensor that an operation returns, those of the backward pass too.

    Args:
        see: Called with each tensor.
    """
    import torch

    tree_map_only = importlib.import_module("torch.utils._pytree").tree_map_only
    base: Any = importlib.import_module("torch.utils._python_dispatch").TorchDispatchMode

    class Watch(base):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            tree_map_only(torch.Tensor, see, out)
            return out

    return cast("AbstractContextManager[Any]", Watch())


@uses(
    "torch:UntypedStorage.nbytes",
    attributes=("_cdata",),
    feature="plan",
    since="2.0",
    replacement="`data_ptr`, which fake tensors do not have",
)
def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a number that two views of the same memory share; Python makes a new object for a storage each time."""
    return int(storage._cdata)


@uses(
    "torch.nn:Module.children",
    attributes=("_modules", "_parameters"),
    feature="exporting an adapter, and the check of what was exported",
    since="2.0",
    replacement="`copy.deepcopy` of the model, which doubles its memory",
)
def copy_sharing_tensors(
    module: torch.nn.Module, copy_child: Callable[[torch.nn.Module], torch.nn.Module]
) -> torch.nn.Module:
    """Return a shallow copy of a module: the same tensors and hooks, in dictionaries of its own.

    Args:
        module: Left as it is.
        copy_child: Returns the copy of a child.
    """
    copied = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):  # parameters, buffers, modules, hooks
            copied.__dict__[name] = OrderedDict(value) if isinstance(value, OrderedDict) else dict(value)
    children = module._modules.items()
    copied._modules = {name: None if child is None else copy_child(child) for name, child in children}
    return copied


@contextmanager
@uses(
    feature="the loss of a sharded model in its head's place, and `plan` with bits: 8",
    since="2.0",
    replacement="a module of our own in the other's place, which hooks and sharding would have to be told of",
)
def forward_replaced_by(module: torch.nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Patch the `forward` of one module; its hooks, and those that gather its weights, run as always.

    `nn.Module.__call__` looks `forward` up on the object. The patch ends with the context.

    Args:
        module: The module, not its class.
        function: Takes what `forward` takes.
    """
    own = vars(module).get("forward")
    vars(module)["forward"] = function
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


@uses(
    feature="fused LoRA layers",
    since="2.0",
    replacement="modules of our own in the place of PEFT's, which PEFT would have to be told of",
)
def change_class(module: torch.nn.Module, subclass: type[torch.nn.Module]) -> None:
    """Patch one module: it gets the methods of a subclass of its class, and keeps everything that it holds.

    Args:
        module: Changed in place; its name, parameters and hooks stay.
        subclass: Adds no attributes.
    """
    module.__class__ = subclass


@uses(
    attributes=("_forward_hooks", "_forward_pre_hooks"),
    feature="fused LoRA layers",
    since="2.0",
    replacement="the layers' own forward pass",
)
def runs_more_than_forward(module: torch.nn.Module) -> bool:
    """Whether calling a module runs hooks too, or another `forward` than its class's."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


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
    "torch._dynamo.callback:callback_handler.register_start_callback",
    "torch._dynamo.callback:callback_handler.register_end_callback",
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
    "torch._dynamo.exc:TorchDynamoException",
    feature="model.torch_compile",
    since="2.0",
    replacement="`RuntimeError`, which it is derived from",
)
def compile_error() -> type[Exception]:
    """Return the class of the errors of `torch.compile`, those of its backends included."""
    return cast("type[Exception]", importlib.import_module("torch._dynamo.exc").TorchDynamoException)


@uses(
    "torch._functorch.config:force_non_lazy_backward_lowering",
    feature="model.torch_compile",
    since="2.8",
    replacement="nothing, once backward passes are compiled before they run",
)
def compile_backward_with_forward() -> None:
    """Patch torch's configuration: a backward pass is compiled with its forward pass, not when it first runs.

    A compilation that fails then does so before anything was computed, when there is still another way. The patch
    stays until the process ends.
    """
    config: Any = importlib.import_module("torch._functorch.config")
    config.force_non_lazy_backward_lowering = True


@uses(
    "torch.nn.attention.varlen:varlen_attn",
    feature="model.attn_implementation: auto on a GPU",
    since="2.11",
    replacement="model.attn_implementation: flash_attention_2",
)
def variable_length_attention() -> Callable[..., torch.Tensor]:
    """Return the attention of documents of different lengths that stand one after the other, in one kernel.

    Returns:
        A function of queries (tokens, heads, head_dim), keys and values (tokens, key/value heads, head_dim), the starts
        of the documents among queries and among keys, the lengths of the longest, and what else `varlen_attn` takes:
        `scale`, `window_size`. Key and value heads are repeated where the kernel cannot share them among query heads.
    """
    attend: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    shares = shares_key_value_heads()

    def attend_to(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *documents: Any, **options: Any
    ) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and shares:
            options["enable_gqa"] = True
        elif groups > 1:
            key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
        return cast("torch.Tensor", attend(query, key, value, *documents, **options))

    return attend_to


@uses(
    "torch.nn.attention.varlen:varlen_attn",
    feature="model.attn_implementation: auto on a GPU",
    since="2.11",
    replacement="model.attn_implementation: flash_attention_2",
)
def shares_key_value_heads() -> bool:
    """Whether torch's variable-length kernel lets query heads share key/value heads (from torch 2.12)."""
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return "enable_gqa" in inspect.signature(attend).parameters
