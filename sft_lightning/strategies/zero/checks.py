"""Check a DeepSpeed configuration for these processes and this machine, before any weight is read."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sft_lightning.errors import UserError
from sft_lightning.strategies.refusals import RunFacts
from sft_lightning.strategies.zero.options import (
    OFFLOAD_OPTIMIZER,
    OFFLOAD_PARAMETERS,
    nvme_folders,
    offload_block,
    stage_of,
)

_PIPELINE = ("pipeline_read", "pipeline_write")
_FORMER_NAMES = {"cpu_offload": OFFLOAD_OPTIMIZER, "cpu_offload_param": OFFLOAD_PARAMETERS}
"""Keys that DeepSpeed has deprecated (deepspeed/runtime/zero/config.py) → their present names."""

_BUFFERS_PER_PARTITION = 4
"""DeepSpeed's buffers for one partition under Adam: weight, gradient and two moments."""

_BUILD_MINUTES = 10
"""Longest build of one of DeepSpeed's operators in minutes: another machine may hold a lock for that long."""

_DIRECT: int = getattr(os, "O_DIRECT", 0)
"""Flag with which libaio opens files; Linux only."""


def check_config(config: Mapping[str, Any], run: RunFacts, *, source: str) -> None:
    """Check that a configuration fits its stage, the number of processes, and the devices.

    Args:
        config: DeepSpeed's configuration.
        run: The model and the processes.
        source: Name of the JSON, for errors.

    Raises:
        UserError: If a key requires another stage or GPUs, the secondary partition of ZeRO++ (Wang et al., 2023,
            arXiv:2306.10209) does not divide the processes, or NVMe offload lacks its folder or enough buffers.
    """
    for error in _errors(config, run.num_processes, run.on_gpu):
        raise UserError(f"{source}: {error}")


def _errors(config: Mapping[str, Any], num_processes: int, on_gpu: bool) -> Iterator[str]:
    zero, stage = config.get("zero_optimization", {}), stage_of(config)
    partition = zero.get("zero_hpz_partition_size", 1)
    has_secondary_partition = partition not in (1, "auto")
    quantized = [key for key in zero if key.startswith("zero_quantized_") and zero[key] is True]
    stage_3_keys = [
        *quantized,
        *(["zero_hpz_partition_size"] if has_secondary_partition else []),
        *([OFFLOAD_PARAMETERS] if offload_block(config, OFFLOAD_PARAMETERS) else []),
        *(f"{block} to nvme" for block in nvme_folders(config)),
    ]
    for former, name in _FORMER_NAMES.items():
        if zero.get(former):
            yield f'zero_optimization.{former} is deprecated by DeepSpeed; use "{name}": {{"device": "cpu"}} instead'
    if stage_3_keys and stage != 3:
        yield f"{stage_3_keys[0]} requires stage 3 (got {stage})"
    if offload_block(config, OFFLOAD_OPTIMIZER) and stage == 0:
        yield f"{OFFLOAD_OPTIMIZER} requires stage 1 or above (got 0)"
    if has_secondary_partition and num_processes % partition:
        yield (
            f"zero_hpz_partition_size {partition} does not divide the {num_processes} processes; set it to the number "
            "of GPUs of a node"
        )
    if not on_gpu:
        for key in (*quantized, *_cuda_keys(config)):
            yield f"{key} requires CUDA, but this run is on the CPU; remove it"
    yield from _nvme_errors(config)


def _cuda_keys(config: Mapping[str, Any]) -> list[str]:
    optimizer = offload_block(config, OFFLOAD_OPTIMIZER)
    enabled = {
        "aio.use_gds": config.get("aio", {}).get("use_gds", False),
        f"{OFFLOAD_OPTIMIZER}.super_offload": optimizer.get("super_offload", False),
        f"{OFFLOAD_OPTIMIZER}.ratio below 1": optimizer.get("ratio", 1.0) not in (1, "auto"),
    }
    return [key for key, is_set in enabled.items() if is_set]


def _nvme_errors(config: Mapping[str, Any]) -> Iterator[str]:
    for block, folder in nvme_folders(config).items():
        if not folder:
            yield f"{block}.nvme_path is missing; name a folder on a local disk"
    optimizer = offload_block(config, OFFLOAD_OPTIMIZER)
    buffers = optimizer.get("buffer_count", _BUFFERS_PER_PARTITION)
    if any(optimizer.get(key) for key in _PIPELINE) and buffers < 2 * _BUFFERS_PER_PARTITION:
        yield (
            f"{OFFLOAD_OPTIMIZER}.buffer_count must be at least {2 * _BUFFERS_PER_PARTITION} (got {buffers}), because "
            f"{' and '.join(_PIPELINE)} hold two partitions of {_BUFFERS_PER_PARTITION} tensors each"
        )


def check_nvme_weight_type(config: Mapping[str, Any], run: RunFacts, *, source: str) -> None:
    """Check that weights on NVMe have the type of DeepSpeed's buffers for them, which is the training type.

    Args:
        config: DeepSpeed's configuration.
        run: The model and the processes.
        source: Name of the JSON, for errors.

    Raises:
        UserError: If they have another type; DeepSpeed would misread their bytes.
    """
    if OFFLOAD_PARAMETERS not in nvme_folders(config):
        return
    if run.model.quantization is not None:
        raise UserError(
            f"{source}: weights on nvme must have the training type, but model.quantization.bits is "
            f"{run.model.quantization.bits}; offload them to cpu, or set model.quantization: null"
        )
    if run.precision == "32-true" and run.model.dtype != "float32":
        raise UserError(
            f"{source}: weights on nvme must have the training type, which is float32 for trainer.precision: "
            f"{run.precision}, but model.dtype is {run.model.dtype}; set trainer.precision: bf16-true or model.dtype: "
            "float32, or offload them to cpu"
        )


def check_nvme(config: Mapping[str, Any], source: str) -> None:
    """Check that this machine can offload to NVMe.

    Args:
        config: DeepSpeed's configuration.
        source: Name of the JSON, for errors.

    Raises:
        UserError: If a folder does not exist, cannot be written, or has no direct access (`O_DIRECT`), or if libaio is
            missing, which DeepSpeed's `async_io` is compiled with.
    """
    folders = nvme_folders(config)
    for folder in folders.values():
        _check_folder(Path(str(folder)), source)
    if not folders:
        return
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise UserError(
            f"{source}: offloading to nvme requires libaio, which is not installed; install it (Debian: apt install "
            "libaio-dev), or offload to cpu"
        )


def _check_folder(folder: Path, source: str) -> None:
    if not folder.is_dir():
        raise UserError(
            f"{source}: nvme_path {str(folder)!r} is not a folder; create it on a local disk, or offload to cpu"
        )
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".sft_lightning_") as probe:
            os.close(os.open(probe.name, os.O_RDWR | _DIRECT))
    except OSError as error:
        raise UserError(
            f"{source}: nvme_path {str(folder)!r} cannot be written with direct access ({error.strerror}); name a "
            "writable folder on a local disk, or offload to cpu"
        ) from error


def check_build_locks() -> None:
    """Check that no killed build of a DeepSpeed operator has left its lock, for which this run would wait forever.

    torch compiles an operator under a file `lock`, which only the process that made it removes.

    Raises:
        UserError: If a lock is older than any build, and no process of this machine has it open.
    """
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(folder) if folder else Path.home() / ".cache" / "torch_extensions"
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]  # torch may add a folder for its version
    for lock in locks:
        if _age_minutes(lock) > _BUILD_MINUTES and not _is_open(lock):
            raise UserError(
                f"trainer.strategy: {str(lock)!r} was left by a run that was killed while DeepSpeed compiled, and this "
                "run would wait for it forever; delete that file"
            )


def _age_minutes(file: Path) -> float:
    try:
        return (time.time() - file.stat().st_mtime) / 60
    except FileNotFoundError:  # the build has just ended
        return 0.0


def _is_open(file: Path) -> bool:
    """Whether a process of this machine (Linux: one that we may look at) has the file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.samefile(file):
                return True
        except OSError:  # the process has ended, or is another user's
            continue
    return False
