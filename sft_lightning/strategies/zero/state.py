"""Gather an optimizer's state from ZeRO's partitions, in the form of a single process's, and load it back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sft_lightning.compat.deepspeed import flat_partitions, gather, link_states, partitions_in_memory, scatter
from sft_lightning.strategies.full_tensors import indices_in_state

Groups = Sequence[Sequence[nn.Parameter]]
"""The parameters of each group of the optimizer, before ZeRO replaces them by partitions."""


def gather_weights(zero: Any, names: Mapping[nn.Parameter, str], *, keep: bool) -> dict[str, torch.Tensor]:
    """Gather the float32 weights that ZeRO's optimizer steps on; every process must call this.

    Args:
        zero: ZeRO's optimizer.
        names: The parameters that train → their names.
        keep: Keep the weights in this process. The other processes take part and get an empty dict.

    Returns:
        Name → full tensor on the CPU, in the shape of the parameter.
    """
    found: dict[str, torch.Tensor] = {}
    for _, parameters in partitions_in_memory(zero, names):
        for parameter in parameters:
            full = gather(zero, parameter, None)
            if keep:
                found[names[parameter]] = full.cpu()
    return {name: found[name] for name in names.values() if name in found}


def gather_state(zero: Any, groups: Groups, *, keep: bool) -> dict[str, Any]:
    """Return the state dict that the inner optimizer would have in a single process; every process must call this.

    Args:
        zero: ZeRO's optimizer.
        groups: The parameters that it was made with.
        keep: Keep the state in this process. The other processes take part and get an empty dict.
    """
    inner = zero.optimizer
    state = inner.state.get(flat_partitions(zero)[0], {})
    if state:
        link_states(zero)
    sharded = sorted(key for key, value in state.items() if _is_sharded(value))
    counters = {key: _as_tensor(value) for key, value in state.items() if not _is_sharded(value)}
    places = {parameter: index for index, parameter in enumerate(parameter for group in groups for parameter in group)}
    found: dict[int, dict[str, Any]] = {}
    for _, parameters in partitions_in_memory(zero, places if state else ()):
        for parameter in parameters:
            full = {key: gather(zero, parameter, key) for key in sharded}
            if keep:
                own = {key: value.clone() for key, value in counters.items()}  # each parameter counts its own steps
                found[places[parameter]] = {**own, **{key: value.cpu() for key, value in full.items()}}
    found = {index: found[index] for index in sorted(found)}
    described = [
        {**{key: value for key, value in group.items() if key != "params"}, "params": indices}
        for group, indices in zip(inner.param_groups, _indices(groups), strict=True)
    ]
    return {"state": found, "param_groups": described} if keep else {}


def load_state(zero: Any, groups: Groups, saved: Mapping[str, Any]) -> None:
    """Load this process's partitions from a full state; needs no communication.

    Args:
        zero: ZeRO's optimizer.
        groups: The parameters that it was made with.
        saved: State dict with full tensors, saved by any number of processes under any strategy.

    Raises:
        RuntimeError: If it is the state of another number of parameters.
    """
    parameters = [parameter for group in groups for parameter in group]
    places = indices_in_state(saved, parameters)
    inner = zero.optimizer
    for mine, theirs in zip(inner.param_groups, saved["param_groups"], strict=True):
        mine.update({key: value for key, value in theirs.items() if key != "params" and key in mine})
    if not saved["state"]:
        return
    example = next(iter(saved["state"].values()))
    for flats, together in partitions_in_memory(zero, parameters, changed=True):
        _make_zero_state(zero, flats, example)
        for parameter in together:
            for key, value in saved["state"].get(places[parameter], {}).items():
                if _is_sharded(value):
                    scatter(zero, parameter, value, key)


def load_weights(zero: Any, weights: Mapping[nn.Parameter, torch.Tensor]) -> None:
    """Load this process's float32 partitions from full weights; needs no communication.

    Args:
        zero: ZeRO's optimizer.
        weights: Parameter → full tensor, in the shape of the parameter.
    """
    for _, parameters in partitions_in_memory(zero, weights, changed=True):
        for parameter in parameters:
            scatter(zero, parameter, weights[parameter], None)


def _make_zero_state(zero: Any, flats: Iterable[torch.Tensor], example: Mapping[str, Any]) -> None:
    """Give partitions a state of zeros; optimizers make their state only in the first step."""
    inner = zero.optimizer
    on_device = bool(inner.defaults.get("fused") or inner.defaults.get("capturable"))
    counts_in_python = type(inner).__name__ == "DeepSpeedCPUAdam"
    for flat in flats:
        state = inner.state[flat]
        for key, value in example.items():
            if _is_sharded(value):
                state[key] = torch.zeros_like(flat)
            elif counts_in_python:
                state[key] = int(value)
            else:
                state[key] = _as_tensor(value).clone().to(flat.device if on_device else "cpu")
    link_states(zero)


def _is_sharded(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _as_tensor(value: Any) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float32)


def _indices(groups: Groups) -> Iterator[list[int]]:
    start = 0
    for group in groups:
        yield list(range(start, start + len(group)))
        start += len(group)
