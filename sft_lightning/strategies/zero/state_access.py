"""Where ZeRO's optimizer keeps a parameter's weight in float32, and its states.

ZeRO flattens what trains into partitions, and an optimizer of torch or of DeepSpeed steps on those (Rajbhandari et al.,
2019, arXiv:1910.02054). Where in them a parameter is, ZeRO-3's optimizer knows, and under ZeRO-1 and -2 the parameter
itself. A partition on NVMe is read once for all of its parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sft_lightning.strategies.zero.partition import is_partitioned, own_part

_PARTITIONS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
"""What ZeRO-3, ZeRO-1 and -2, and ZeRO-1 in bfloat16 call them."""


def partitions(zero: Any) -> list[torch.Tensor]:
    """Return this process's flat float32 partitions; none if the optimizer is not ZeRO's."""
    return next((list(getattr(zero, name)) for name in _PARTITIONS if hasattr(zero, name)), [])


def in_memory(
    zero: Any, parameters: Iterable[nn.Parameter], *, changed: bool = False
) -> Iterator[tuple[list[torch.Tensor], list[nn.Parameter]]]:
    """Yield partitions that are in memory, and the parameters that lie in them.

    Args:
        zero: ZeRO's optimizer.
        parameters: What trains.
        changed: Write the partition back; else what was read from NVMe is dropped.
    """
    by_partition: dict[int | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_partition.setdefault(_index(zero, parameter), []).append(parameter)
    for index, together in by_partition.items():
        flats = partitions(zero) if index is None else [partitions(zero)[index]]
        with _off_nvme(zero, index, changed=changed):
            yield flats, together


@contextmanager
def _off_nvme(zero: Any, index: int | None, *, changed: bool) -> Iterator[None]:
    """Have one of ZeRO-3's partitions, and its optimizer's state, in memory."""
    if index is None or not zero._swappable_optimizer_subgroup(index):
        yield
        return
    zero._optimizer_states_and_gradient_swap_in(index)
    yield
    if changed:
        zero._optimizer_states_and_gradient_swap_out(index)
    else:
        zero._release_swap_buffers(index)


def link(zero: Any) -> None:
    """Let ZeRO-1's and -2's parameters know their states.

    DeepSpeed does so once, after the first group's first step, when the other groups have none yet.
    """
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _index(zero: Any, parameter: Any) -> int | None:
    """Return which of ZeRO-3's partitions a parameter is in; `None` under ZeRO-1 and -2, where it may be in two."""
    return int(zero.grad_position[parameter.ds_id][0]) if is_partitioned(parameter) else None


def _part(zero: Any, parameter: Any, key: str | None) -> torch.Tensor:
    """Return what this process has under ZeRO-3 of a weight (`key` is `None`) or a state, in its partition."""
    index, start, size = zero.grad_position[parameter.ds_id]
    flat = partitions(zero)[index]
    part: torch.Tensor = flat if key is None else zero.optimizer.state[flat][key]
    return part.detach().narrow(0, int(start), int(size))


def get(zero: Any, parameter: Any, key: str | None) -> torch.Tensor:
    """Gather a whole weight (`key` is `None`) or state of a parameter; every process must call this."""
    if is_partitioned(parameter):
        gathered: torch.Tensor = zero._fp32_state_allgather(parameter, _part(zero, parameter, key))
        return gathered
    whole: torch.Tensor = parameter.get_full_hp_param(key)
    return whole


def put(zero: Any, parameter: Any, value: torch.Tensor, key: str | None) -> None:
    """Set a weight (`key` is `None`) or a state of a parameter from the whole tensor."""
    if is_partitioned(parameter):
        _part(zero, parameter, key).copy_(own_part(parameter, value))
    else:
        parameter.set_full_hp_param(value, key)
