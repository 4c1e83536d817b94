"""An optimizer's whole state out of ZeRO's partitions and back, parameter by parameter, in a single process's form.

ZeRO flattens what trains into partitions, and an optimizer of torch or of DeepSpeed steps on those (Rajbhandari et al.,
2019, arXiv:1910.02054). `deepspeed.utils.tensor_fragment` knows where in them a parameter is.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

Groups = Sequence[Sequence[nn.Parameter]]
"""The parameters of each group of the optimizer, as it was made."""

_PARTITIONS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
"""What ZeRO-3, ZeRO-1 and -2, and ZeRO-1 in bfloat16 call them."""


def partitions(zero: Any) -> list[torch.Tensor]:
    """Return this process's flat float32 partitions; none if the optimizer is not ZeRO's."""
    return next((list(getattr(zero, name)) for name in _PARTITIONS if hasattr(zero, name)), [])


def gather_weights(names: Mapping[nn.Parameter, str], *, keep: bool) -> dict[str, torch.Tensor]:
    """Gather the float32 weights that ZeRO's optimizer steps on; every process must call this.

    Args:
        names: What trains, and what it is called.
        keep: Whether this process wants them; another takes part and gets nothing.
    """
    fragments = _fragments()
    found = {}
    for parameter, name in names.items():
        whole = fragments.safe_get_full_fp32_param(parameter)
        if keep:
            found[name] = whole.cpu()
    return found


def gather_state(zero: Any, groups: Groups, *, keep: bool) -> dict[str, Any]:
    """Return the state dict that the inner optimizer would have in a single process; every process must call this.

    Args:
        zero: ZeRO's optimizer.
        groups: The parameters it was made with.
        keep: Whether this process wants it; another takes part and gets an empty dict.
    """
    fragments, inner = _fragments(), zero.optimizer
    state = inner.state.get(partitions(zero)[0], {})
    if state:
        _link(zero)
    sharded = sorted(key for key, value in state.items() if _is_sharded(value))
    single = {key: _as_tensor(value) for key, value in state.items() if not _is_sharded(value)}
    found: dict[int, dict[str, Any]] = {}
    for index, parameter in enumerate(parameter for group in groups for parameter in group):
        whole = {key: fragments.safe_get_full_optimizer_state(parameter, key) for key in sharded}
        if keep and state:
            counts = {key: value.clone() for key, value in single.items()}  # each parameter counts its own steps
            found[index] = {**counts, **{key: value.cpu() for key, value in whole.items()}}
    described = [
        {**{key: value for key, value in group.items() if key != "params"}, "params": indices}
        for group, indices in zip(inner.param_groups, _indices(groups), strict=True)
    ]
    return {"state": found, "param_groups": described} if keep else {}


def load_state(zero: Any, groups: Groups, saved: Mapping[str, Any]) -> None:
    """Put a whole state, of any number of processes, into this process's partitions; needs no communication.

    Raises:
        RuntimeError: If it is the state of another number of parameters.
    """
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    parameters = [parameter for group in groups for parameter in group]
    if len(indices) != len(parameters):
        raise RuntimeError(
            f"the checkpoint's optimizer has {len(indices)} parameters, and this run's has {len(parameters)}"
        )
    inner = zero.optimizer
    for mine, theirs in zip(inner.param_groups, saved["param_groups"], strict=True):
        mine.update({key: value for key, value in theirs.items() if key != "params" and key in mine})
    if not saved["state"]:
        return
    _make_room(zero, next(iter(saved["state"].values())))
    for index, parameter in zip(indices, parameters, strict=True):
        for key, value in saved["state"].get(index, {}).items():
            if _is_sharded(value):
                _set(parameter, value, key)


def load_weights(weights: Mapping[nn.Parameter, torch.Tensor]) -> None:
    """Put whole weights into the float32 partitions; needs no communication."""
    for parameter, value in weights.items():
        _set(parameter, value, None)


def _make_room(zero: Any, example: Mapping[str, Any]) -> None:
    """Give every partition a state of zeros: optimizers make theirs only in their first step."""
    inner = zero.optimizer
    on_device = bool(inner.defaults.get("fused") or inner.defaults.get("capturable"))
    counts_in_python = type(inner).__name__ == "DeepSpeedCPUAdam"
    for flat in partitions(zero):
        state = inner.state[flat]
        for key, value in example.items():
            if _is_sharded(value):
                state[key] = torch.zeros_like(flat)
            elif counts_in_python:
                state[key] = int(value)
            else:
                state[key] = _as_tensor(value).clone().to(flat.device if on_device else "cpu")
    _link(zero)


def _link(zero: Any) -> None:
    """Let ZeRO-1's and -2's parameters know their states.

    DeepSpeed does so once, after the first group's first step, when the other groups have none yet.
    """
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _set(parameter: nn.Parameter, value: torch.Tensor, key: str | None) -> None:
    """Set the weight (`key` is `None`) or a state of a parameter from the whole tensor."""
    fragments, each = _fragments(), (key,) if key is not None else ()
    if not hasattr(parameter, "ds_id"):
        of_whole = fragments.safe_set_full_optimizer_state if each else fragments.safe_set_full_fp32_param
        of_whole(parameter, value, *each)
        return
    of_part = fragments.safe_set_local_optimizer_state if each else fragments.safe_set_local_fp32_param
    of_part(parameter, _own_part(parameter, value), *each)


def _own_part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """Cut out what ZeRO-3 gives this process of a tensor, which it fills up with zeros to divide it evenly."""
    size, group = parameter.ds_tensor.numel(), parameter.ds_process_group
    padding = size * dist.get_world_size(group) - value.numel()
    padded = nn.functional.pad(value.flatten(), (0, padding))
    return padded.narrow(0, size * dist.get_rank(group), size)


def _is_sharded(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _as_tensor(value: Any) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float32)


def _indices(groups: Groups) -> Iterator[list[int]]:
    start = 0
    for group in groups:
        yield list(range(start, start + len(group)))
        start += len(group)


def _fragments() -> Any:
    return importlib.import_module("deepspeed.utils.tensor_fragment")
