"""An optimizer's whole state out of ZeRO's partitions and back, parameter by parameter, in a single process's form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sft_lightning.compat.deepspeed import flat_partitions, gather, link_states, partitions_in_memory, scatter

Groups = Sequence[Sequence[nn.Parameter]]
"""The parameters of each group of the optimizer, as it was made."""


def gather_weights(zero: Any, names: Mapping[nn.Parameter, str], *, keep: bool) -> dict[str, torch.Tensor]:
    """Gather the float32 weights that ZeRO's optimizer steps on; every process must call this.

    Args:
        zero: ZeRO's optimizer.
        names: What trains, and what it is called.
        keep: Whether this process wants them; another takes part and gets nothing.
    """
    found: dict[str, torch.Tensor] = {}
    for _, parameters in partitions_in_memory(zero, names):
        for parameter in parameters:
            whole = gather(zero, parameter, None)
            if keep:
                found[names[parameter]] = whole.cpu()
    return {name: found[name] for name in names.values() if name in found}


def gather_state(zero: Any, groups: Groups, *, keep: bool) -> dict[str, Any]:
    """Return the state dict that the inner optimizer would have in a single process; every process must call this.

    Args:
        zero: ZeRO's optimizer.
        groups: The parameters it was made with.
        keep: Whether this process wants it; another takes part and gets an empty dict.
    """
    inner = zero.optimizer
    state = inner.state.get(flat_partitions(zero)[0], {})
    if state:
        link_states(zero)
    sharded = sorted(key for key, value in state.items() if _is_sharded(value))
    single = {key: _as_tensor(value) for key, value in state.items() if not _is_sharded(value)}
    places = {parameter: index for index, parameter in enumerate(parameter for group in groups for parameter in group)}
    found: dict[int, dict[str, Any]] = {}
    for _, parameters in partitions_in_memory(zero, places if state else ()):
        for parameter in parameters:
            whole = {key: gather(zero, parameter, key) for key in sharded}
            if keep:
                counts = {key: value.clone() for key, value in single.items()}  # each parameter counts its own steps
                found[places[parameter]] = {**counts, **{key: value.cpu() for key, value in whole.items()}}
    found = {index: found[index] for index in sorted(found)}
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
    places = dict(zip(parameters, indices, strict=True))
    example = next(iter(saved["state"].values()))
    for flats, together in partitions_in_memory(zero, parameters, changed=True):
        _make_room(zero, flats, example)
        for parameter in together:
            for key, value in saved["state"].get(places[parameter], {}).items():
                if _is_sharded(value):
                    scatter(zero, parameter, value, key)


def load_weights(zero: Any, weights: Mapping[nn.Parameter, torch.Tensor]) -> None:
    """Put whole weights into the float32 partitions; needs no communication."""
    for _, parameters in partitions_in_memory(zero, weights, changed=True):
        for parameter in parameters:
            scatter(zero, parameter, weights[parameter], None)


def _make_room(zero: Any, flats: Iterable[torch.Tensor], example: Mapping[str, Any]) -> None:
    """Give partitions a state of zeros: optimizers make theirs only in their first step."""
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
