"""Whether what is asked of ZeRO can be had from these processes on this machine; said before any weight is read."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sft_lightning.errors import UserError
from sft_lightning.strategies.refusals import RunFacts
from sft_lightning.strategies.zero.options import (
    OFFLOAD_OPTIMIZER,
    OFFLOAD_PARAMETERS,
    nvme_folders,
    offload_of,
    stage_of,
)

_PIPELINE = ("pipeline_read", "pipeline_write")
_FORMER_NAMES = {"cpu_offload": OFFLOAD_OPTIMIZER, "cpu_offload_param": OFFLOAD_PARAMETERS}
"""Keys that DeepSpeed has deprecated (deepspeed/runtime/zero/config.py) → what they are called now."""

_TENSORS_OF_ADAM = 4
"""Weight, gradient and two moments: DeepSpeed's buffers for one partition."""

_DIRECT: int = getattr(os, "O_DIRECT", 0)
"""How libaio wants its files opened; Linux's."""


def check_sense(config: Mapping[str, Any], run: RunFacts, *, source: str) -> None:
    """Check what a configuration asks of its stage, of the number of processes, and of what they compute on.

    Args:
        config: DeepSpeed's configuration.
        run: The model and the processes.
        source: Name of the JSON, for errors.

    Raises:
        UserError: If something is not of the stage, the secondary partition of ZeRO++ (Wang et al., 2023,
            arXiv:2306.10209) does not divide the processes, something exists on GPUs alone, or NVMe has no folder or
            too few buffers.
    """
    for contradiction in _contradictions(config, run.num_processes, run.on_gpu):
        raise UserError(f"{source}: {contradiction}")


def _contradictions(config: Mapping[str, Any], num_processes: int, on_gpu: bool) -> Iterator[str]:
    zero, stage = config.get("zero_optimization", {}), stage_of(config)
    partition = zero.get("zero_hpz_partition_size", 1)
    has_secondary_partition = partition not in (1, "auto")
    quantized = [key for key in zero if key.startswith("zero_quantized_") and zero[key] is True]
    of_stage_3 = [
        *quantized,
        *(["zero_hpz_partition_size"] if has_secondary_partition else []),
        *([OFFLOAD_PARAMETERS] if offload_of(config, OFFLOAD_PARAMETERS) else []),
        *(f"{what} to nvme" for what in nvme_folders(config)),
    ]
    for former, name in _FORMER_NAMES.items():
        if zero.get(former):
            yield f'zero_optimization.{former} is what DeepSpeed called it once; write "{name}": {{"device": "cpu"}}'
    if of_stage_3 and stage != 3:
        yield f"{of_stage_3[0]} is of ZeRO-3, and the stage is {stage}; set stage 3"
    if offload_of(config, OFFLOAD_OPTIMIZER) and stage == 0:
        yield f"{OFFLOAD_OPTIMIZER} is of ZeRO-1 and above, and the stage is 0; set stage 1 or 2"
    if has_secondary_partition and num_processes % partition:
        yield (
            f"zero_hpz_partition_size {partition} does not divide the {num_processes} processes; set it to the number "
            "of GPUs of a node"
        )
    if not on_gpu:
        for key in (*quantized, *_on_gpus_alone(config)):
            yield f"{key} needs CUDA, and this run is on the CPU; remove it"
    yield from _of_nvme(config)


def _on_gpus_alone(config: Mapping[str, Any]) -> list[str]:
    optimizer = offload_of(config, OFFLOAD_OPTIMIZER)
    asked = {
        "aio.use_gds": config.get("aio", {}).get("use_gds", False),
        f"{OFFLOAD_OPTIMIZER}.super_offload": optimizer.get("super_offload", False),
        f"{OFFLOAD_OPTIMIZER}.ratio below 1": optimizer.get("ratio", 1.0) not in (1, "auto"),
    }
    return [key for key, wanted in asked.items() if wanted]


def _of_nvme(config: Mapping[str, Any]) -> Iterator[str]:
    for what, folder in nvme_folders(config).items():
        if not folder:
            yield f"{what}.nvme_path is missing; name a folder on a local disk"
    optimizer = offload_of(config, OFFLOAD_OPTIMIZER)
    buffers = optimizer.get("buffer_count", _TENSORS_OF_ADAM)
    if any(optimizer.get(key) for key in _PIPELINE) and buffers < 2 * _TENSORS_OF_ADAM:
        yield (
            f"{OFFLOAD_OPTIMIZER}.buffer_count {buffers} holds one partition of Adam's {_TENSORS_OF_ADAM} tensors, and "
            f"{' and '.join(_PIPELINE)} want a second one; set buffer_count {2 * _TENSORS_OF_ADAM}"
        )


def check_one_type(config: Mapping[str, Any], run: RunFacts, *, source: str) -> None:
    """Check that weights on NVMe have the one type that DeepSpeed's buffers for them have: that of training.

    Raises:
        UserError: If they have another; DeepSpeed would read them as what they are not.
    """
    if OFFLOAD_PARAMETERS not in nvme_folders(config):
        return
    if run.model.quantization is not None:
        raise UserError(
            f"{source}: weights on nvme have the type that is trained in, and model.quantization.bits is "
            f"{run.model.quantization.bits}; offload them to cpu, or set model.quantization: null"
        )
    if run.precision == "32-true" and run.model.dtype != "float32":
        raise UserError(
            f"{source}: weights on nvme have the type that is trained in, which is float32 for trainer.precision: "
            f"{run.precision}, and model.dtype is {run.model.dtype}; set trainer.precision: bf16-true, or model.dtype: "
            "float32, or offload them to cpu"
        )


def check_nvme(config: Mapping[str, Any], source: str) -> None:
    """Check that what is offloaded to NVMe can be written there, and that DeepSpeed can do it.

    Raises:
        UserError: If a folder is missing, cannot be written, or is on a file system without direct access, or if libaio
            is missing, which DeepSpeed's `async_io` is compiled with.
    """
    folders = nvme_folders(config)
    for folder in folders.values():
        _check_folder(Path(str(folder)), source)
    if not folders:
        return
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise UserError(
            f"{source}: offloading to nvme needs libaio, which is not installed (Debian: apt install libaio-dev); "
            "or offload to cpu"
        )


def _check_folder(folder: Path, source: str) -> None:
    if not folder.is_dir():
        raise UserError(
            f"{source}: nvme_path {str(folder)!r} is no folder; make it, on a local disk, or offload to cpu"
        )
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".sft_lightning_") as probe:
            os.close(os.open(probe.name, os.O_RDWR | _DIRECT))
    except OSError as error:
        raise UserError(
            f"{source}: nvme_path {str(folder)!r} cannot be written with direct access ({error.strerror}); name a "
            "folder on a local disk that you may write to, or offload to cpu"
        ) from error
