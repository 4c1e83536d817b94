"""Undocumented parts of torch that we use."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
    replacement="`optimizer.defaults['fused']`, which decides if the attribute is missing",
)
def unscales_in_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step unscales the gradients instead of the loss scaler, as with fused optimizers.

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
    """Return a context in which tensors have shapes, types and devices, but no memory; real tensors may be mixed in."""
    return importlib.import_module("torch._subclasses.fake_tensor").FakeTensorMode(allow_non_fake_inputs=True)


@uses(
    "torch.utils._python_dispatch:TorchDispatchMode.__torch_dispatch__",
    "torch.utils._pytree:tree_map_only",
    feature="plan",
    since="2.0",
    replacement="the documented `torch.overrides.TorchFunctionMode`, which does not see the backward pass",
)
def watching_operations(see: Callable[[torch.Tensor], Any]) -> AbstractContextManager[Any]:
    """Return a context that reports every tensor that an operation returns, also in the backward pass.

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
    feature="exporting an adapter, and checking the export",
    since="2.0",
    replacement="`copy.deepcopy` of the model, which doubles its memory",
)
def copy_sharing_tensors(
    module: torch.nn.Module, copy_child: Callable[[torch.nn.Module], torch.nn.Module]
) -> torch.nn.Module:
    """Return a shallow copy of a module: the same tensors and hooks, in separate dictionaries.

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
    feature="the chunked loss of a sharded model, and `plan` with model.quantization.bits: 8",
    since="2.0",
    replacement="a module that replaces the other one; hooks and sharding would have to be set up for it",
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


@contextmanager
@uses(
    "torch.nn.functional:dropout",
    feature="plan",
    since="2.0",
    replacement="fake tensors on a GPU, which the CPU build of torch refuses",
)
def dropout_replaced_by(function: Callable[..., Any]) -> Iterator[None]:
    """Patch `torch.nn.functional.dropout`, which every dropout layer calls. The patch ends with the context.

    Args:
        function: Takes what `dropout` takes.
    """
    functional: Any = importlib.import_module("torch.nn.functional")
    own = functional.dropout
    functional.dropout = function
    try:
        yield
    finally:
        functional.dropout = own


@uses(
    feature="fused LoRA layers",
    since="2.0",
    replacement="modules that replace PEFT's; PEFT would have to be told of them",
)
def change_class(module: torch.nn.Module, subclass: type[torch.nn.Module]) -> None:
    """Patch one module: change its class to a subclass; its parameters, buffers and hooks stay.

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
    """Whether calling a module runs hooks, or a `forward` other than that of its class."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


@uses(
    "torch.autograd:_unsafe_preserve_version_counter",
    feature="fused LoRA layers",
    since="2.4",
    replacement="`torch.addmm`, which reads and writes the output once more",
)
def hidden_change(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autograd does not notice in-place changes of a tensor.

    Selective recomputation keeps the output of a matrix product, and refuses one that changed afterwards.

    Args:
        tensor: Of any shape; nobody may read it between the operation that made it and the change.
    """
    if tensor.is_inference():  # autograd does not follow it at all
        return nullcontext()
    return cast(
        "AbstractContextManager[Any]",
        importlib.import_module("torch.autograd")._unsafe_preserve_version_counter(tensor),
    )


@uses(
    "torch.nn.attention.varlen:varlen_attn",
    feature="model.attn_implementation: auto on a GPU",
    since="2.11",
    replacement="model.attn_implementation: flash_attention_2",
)
def variable_length_attention(*, repeat_heads: bool = True) -> Callable[..., torch.Tensor]:
    """Return a function that computes attention within each document of a packed row, in one kernel.

    Args:
        repeat_heads: Repeat key/value heads for their query heads where the kernel has no argument for sharing them.
            FlashAttention-2 shares them without one.

    Returns:
        A function of queries (tokens, heads, head_dim), keys and values (tokens, key/value heads, head_dim), the starts
        of the documents among queries and among keys, the lengths of the longest, and what else `varlen_attn` takes:
        `scale`, `window_size`.
    """
    attend: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    shares = shares_key_value_heads()

    def attend_to(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *documents: Any, **options: Any
    ) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and shares:
            options["enable_gqa"] = True
        elif groups > 1 and repeat_heads:
            key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
        return cast("torch.Tensor", attend(query, key, value, *documents, **options))

    return attend_to


@uses(
    "torch.nn.attention:activate_flash_attention_impl",
    feature="FlashAttention-3 and -4",
    since="2.11",
    replacement="model.attn_implementation: flash_attention_3",
)
def activate_flash_attention(version: str) -> None:
    """Let torch's attention in this process be computed by another version of FlashAttention; a prototype of torch's.

    Args:
        version: `FA3` or `FA4`.
    """
    importlib.import_module("torch.nn.attention").activate_flash_attention_impl(version)


@uses(
    "torch.nn.attention:restore_flash_attention_impl",
    feature="FlashAttention-3 and -4",
    since="2.11",
    replacement="nothing, where none can be activated",
    optional=True,
)
def restore_flash_attention() -> None:
    """Undo `activate_flash_attention`; nothing happens if no version was activated."""
    importlib.import_module("torch.nn.attention").restore_flash_attention_impl(_raise_warn=False)


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
