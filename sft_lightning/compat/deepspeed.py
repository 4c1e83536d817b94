"""Where ZeRO stores a parameter: this process's part of its weight, of its float32 copy and of the optimizer's states.

ZeRO flattens what trains into partitions, and an optimizer of torch or of DeepSpeed steps on those (Rajbhandari et al.,
2019, arXiv:1910.02054). ZeRO-3's optimizer knows where in them a parameter is; under ZeRO-1 and -2 the parameter itself
does. DeepSpeed's documented accessors (such as `safe_get_full_fp32_param`) read a partition from NVMe again for each
parameter, and skip a weight whose own part is in memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from sft_lightning.compat.names import uses
from sft_lightning.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

_PARAMETERS = "deepspeed.runtime.zero.partition_parameters"
_STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_FLAT_PARTITIONS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
"""What ZeRO-3, ZeRO-1 and -2, and ZeRO-1 in bfloat16 call them."""

_SAVING = "saving and continuing a run under trainer.strategy: deepspeed_stage_*"


@uses(
    "deepspeed.accelerator.cpu_accelerator:CPU_Accelerator.is_fp16_supported",
    feature="trainer.precision: 16-mixed or 16-true under trainer.strategy: deepspeed_stage_* on a CPU",
    since="0.10",
    replacement="DeepSpeed's own refusal, which comes after the model is loaded",
)
def cpu_has_float16() -> bool:
    """Whether DeepSpeed can train in float16 on this CPU (x86: AVX512-FP16), as its engine checks."""
    accelerator = importlib.import_module("deepspeed.accelerator.cpu_accelerator").CPU_Accelerator()
    return bool(accelerator.is_fp16_supported())


@uses(
    "deepspeed.comm.torch:build_shm_op",
    "deepspeed.ops:__compatible_ops__",
    feature="fast start of trainer.strategy: deepspeed_stage_* on a CPU",
    since="0.15",
    replacement="not needed; DeepSpeed then compiles the operator at the first start, which takes over a minute",
    optional=True,
)
def skip_serving_operator() -> None:
    """Start DeepSpeed on a CPU without its shared-memory operator, which only `inference_all_reduce` calls."""
    importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False


# --- a weight under ZeRO-3 --------------------------------------------------------------------------------------------


@uses(
    feature="trainer.strategy: deepspeed_stage_3",
    since="0.5",
    replacement="`deepspeed.runtime.zero.partition_parameters.is_zero_param`",
)
def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether a parameter is partitioned by ZeRO-3 (it has a `ds_id`)."""
    return hasattr(parameter, "ds_id")


@uses(
    feature="trainer.strategy: deepspeed_stage_3",
    since="0.5",
    replacement="noting the shapes before the model is partitioned",
)
def full_shape(parameter: torch.Tensor) -> torch.Size:
    """Return the full shape of a parameter, partitioned (`ds_shape`) or not."""
    return cast("torch.Size", getattr(parameter, "ds_shape", parameter.shape))


@uses(
    feature="trainer.strategy: deepspeed_stage_3",
    since="0.5",
    replacement="`deepspeed.utils.safe_get_local_fp32_param`",
)
def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a partitioned parameter (`ds_tensor`); of any other, the tensor itself."""
    return cast("torch.Tensor", getattr(tensor, "ds_tensor", tensor))


@uses(
    f"{_PARAMETERS}:Init",
    attributes=("ds_tensor.ds_numel", "ds_process_group"),
    feature=_SAVING,
    since="0.5",
    replacement="loading inside `deepspeed.zero.GatheredParameters`, one parameter at a time",
)
def cut_own_part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """Return the part of a full tensor that ZeRO-3 gives this process, padded with zeros at the end.

    Args:
        parameter: The partitioned parameter.
        value: The whole tensor, of any shape.

    Returns:
        The part, in the shape (ds_numel,).
    """
    import torch.distributed as dist
    from torch.nn.functional import pad

    size, group = parameter.ds_tensor.ds_numel, parameter.ds_process_group
    padding = size * dist.get_world_size(group) - value.numel()
    return pad(value.flatten(), (0, padding)).narrow(0, size * dist.get_rank(group), size)


@contextmanager
@uses(
    f"{_PARAMETERS}:Init",
    attributes=("ds_tensor.final_location",),
    feature=_SAVING,
    since="0.5",
    replacement="loading inside `deepspeed.zero.GatheredParameters`, one parameter at a time",
)
def own_part_in_memory(parameter: Any) -> Iterator[torch.Tensor]:
    """Keep this process's part of a parameter in memory inside the block, and write it back if it is from NVMe."""
    on_nvme = parameter.ds_tensor.final_location == "nvme"
    if on_nvme:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    yield parameter.ds_tensor.data
    if on_nvme:
        parameter.nvme_swapper.swap_out_and_release([parameter])


@uses(
    f"{_PARAMETERS}:ZeroParamStatus.AVAILABLE",
    attributes=("ds_status.name",),
    feature="trainer.strategy: deepspeed_stage_3",
    since="0.5",
    replacement="the size of `parameter.data`, which is 0 while it is partitioned",
)
def is_gathered(parameter: Any) -> bool:
    """Whether a partitioned parameter is gathered at the moment."""
    return str(parameter.ds_status.name) == "AVAILABLE"


@uses(
    f"{_PARAMETERS}:_init_external_params",
    feature="trainer.strategy: deepspeed_stage_3",
    since="0.5",
    replacement="our own list of what was passed to `register_external_parameter`",
)
def external_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights of other modules that were registered with DeepSpeed for a module."""
    registered: Any = getattr(module, "ds_external_parameters", dict)()
    return [parameter for _, parameter in registered] if registered else []


# --- what ZeRO's optimizer holds --------------------------------------------------------------------------------------


@uses(
    feature="saving and continuing a run under trainer.strategy: deepspeed_stage_*",
    since="0.5",
    replacement="`deepspeed.utils.safe_get_local_fp32_param`",
)
def flat_partitions(zero: Any) -> list[torch.Tensor]:
    """Return this process's flat float32 partitions; none if the optimizer is not ZeRO's.

    Raises:
        UserError: If it is ZeRO's, and keeps its partitions under a name that is not known here.
    """
    found = next((list(getattr(zero, name)) for name in _FLAT_PARTITIONS if hasattr(zero, name)), [])
    if not found and type(zero).__module__.startswith("deepspeed.runtime.zero"):
        raise UserError(
            f"{_SAVING}: not available, because {type(zero).__name__} of the installed deepspeed has none of "
            f"{', '.join(_FLAT_PARTITIONS)}; install an earlier release"
        )
    return found


@uses(
    feature="saving and continuing a run under trainer.strategy: deepspeed_stage_3",
    since="0.5",
    replacement="`deepspeed.utils.safe_get_local_fp32_param`, which reads a partition once for each parameter",
)
def partitions_in_memory(
    zero: Any, parameters: Iterable[nn.Parameter], *, changed: bool = False
) -> Iterator[tuple[list[torch.Tensor], list[nn.Parameter]]]:
    """Yield each partition, read from NVMe once, with the parameters that are stored in it.

    Args:
        zero: ZeRO's optimizer.
        parameters: What trains.
        changed: Write the partition back; else what was read from NVMe is dropped.
    """
    by_partition: dict[int | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_partition.setdefault(_index(zero, parameter), []).append(parameter)
    for index, together in by_partition.items():
        if index is None:
            yield flat_partitions(zero), together
            continue
        with _off_nvme(zero, index, changed=changed):
            yield [flat_partitions(zero)[index]], together


@contextmanager
@uses(
    f"{_STAGE_3}._swappable_optimizer_subgroup",
    f"{_STAGE_3}._optimizer_states_and_gradient_swap_in",
    f"{_STAGE_3}._optimizer_states_and_gradient_swap_out",
    f"{_STAGE_3}._release_swap_buffers",
    feature=_SAVING,
    since="0.17",
    replacement="`deepspeed.utils.safe_get_full_fp32_param` and the like",
)
def _off_nvme(zero: Any, index: int, *, changed: bool) -> Iterator[None]:
    """Keep one of ZeRO-3's partitions, with its optimizer state, in memory inside the block."""
    if not zero._swappable_optimizer_subgroup(index):
        yield
        return
    zero._optimizer_states_and_gradient_swap_in(index)
    yield
    if changed:
        zero._optimizer_states_and_gradient_swap_out(index)
    else:
        zero._release_swap_buffers(index)


@uses(
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state",
    feature=_SAVING,
    since="0.14",
    replacement="not needed once DeepSpeed links the states of every group when they are made",
)
def link_states(zero: Any) -> None:
    """Link ZeRO-1's and -2's parameters to their states; DeepSpeed does so once, when only the first group has any."""
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _index(zero: Any, parameter: Any) -> int | None:
    """Return which of ZeRO-3's partitions a parameter is in; `None` under ZeRO-1 and -2, where it may be in two."""
    return int(zero.grad_position[parameter.ds_id][0]) if is_partitioned(parameter) else None


def _part(zero: Any, parameter: Any, key: str | None) -> torch.Tensor:
    """Return what this process has under ZeRO-3 of a weight (`key` is `None`) or a state, in its partition."""
    index, start, size = zero.grad_position[parameter.ds_id]
    flat = flat_partitions(zero)[index]
    part: torch.Tensor = flat if key is None else zero.optimizer.state[flat][key]
    return part.detach().narrow(0, int(start), int(size))


@uses(
    f"{_STAGE_3}._fp32_state_allgather",
    "deepspeed.utils.mixed_precision_linkage:get_full_hp_param",
    feature=_SAVING,
    since="0.11",
    replacement="`deepspeed.utils.safe_get_full_fp32_param` and `safe_get_full_optimizer_state`",
)
def gather(zero: Any, parameter: Any, key: str | None) -> torch.Tensor:
    """Gather a weight or a state of a parameter; every process must call this, inside `partitions_in_memory`.

    Args:
        zero: ZeRO's optimizer.
        parameter: What trains.
        key: Name of the state, as `exp_avg`; `None` for the weight in float32.

    Returns:
        The whole tensor, in the shape of the parameter.
    """
    if is_partitioned(parameter):
        return cast("torch.Tensor", zero._fp32_state_allgather(parameter, _part(zero, parameter, key)))
    return cast("torch.Tensor", parameter.get_full_hp_param(key))


@uses(
    "deepspeed.utils.mixed_precision_linkage:set_full_hp_param",
    feature=_SAVING,
    since="0.11",
    replacement="`deepspeed.utils.safe_set_full_fp32_param` and `safe_set_full_optimizer_state`",
)
def scatter(zero: Any, parameter: Any, value: torch.Tensor, key: str | None) -> None:
    """Set a weight or a state of a parameter from the full tensor, inside `partitions_in_memory`.

    Args:
        zero: ZeRO's optimizer.
        parameter: What trains.
        value: The whole tensor, in the shape of the parameter, the same in every process.
        key: Name of the state; `None` for the weight in float32.
    """
    if is_partitioned(parameter):
        _part(zero, parameter, key).copy_(cut_own_part(parameter, value))
    else:
        parameter.set_full_hp_param(value, key)
