"""What a strategy divides among GPUs, keeps on the host, and holds for the sake of communication."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sft_lightning.strategies.zero.config import read_config

Kind = Literal["alone", "ddp", "fsdp2", "zero"]


@dataclass(frozen=True)
class Sharding:
    """How many GPUs share each part; 1 where every GPU has all of it."""

    name: str
    kind: Kind = "alone"
    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    stage: int = 0
    """Of ZeRO."""

    weights_on_host: bool = False
    optimizer_on_host: bool = False
    """The optimizer's states and its step, and so gradients as soon as they are reduced."""


def fsdp2(num_gpus: int, replicas: int = 1, *, offload: bool = False) -> Sharding:
    """Return what FSDP2 divides: everything, over the GPUs that share a copy of the model (Zhao et al., 2023).

    Args:
        num_gpus: GPUs.
        replicas: Copies of the model.
        offload: Whether shards are in host memory.
    """
    share = max(1, num_gpus // replicas)
    name = "FSDP2" + (f", {replicas} copies" if replicas > 1 else "") + (", offloaded" if offload else "")
    return Sharding(name, "fsdp2", share, share, share, weights_on_host=offload, optimizer_on_host=offload)


def zero(num_gpus: int, stage: int, *, offload_optimizer: bool = False, offload_parameters: bool = False) -> Sharding:
    """Return what a ZeRO stage divides: optimizer states from 1 on, gradients from 2 on, weights from 3 on.

    Rajbhandari et al., 2019, arXiv:1910.02054.
    """
    return Sharding(
        f"ZeRO-{stage}{', offloaded' if offload_optimizer or offload_parameters else ''}",
        "zero",
        num_gpus if stage >= 3 else 1,
        num_gpus if stage >= 2 else 1,
        num_gpus if stage >= 1 else 1,
        stage,
        weights_on_host=offload_parameters,
        optimizer_on_host=offload_optimizer,
    )


def sharding_of(strategy: Any, num_gpus: int) -> Sharding:
    """Return what `trainer.strategy` divides; what is none of FSDP2 and ZeRO divides nothing.

    Args:
        strategy: A name, or a class path with arguments.
        num_gpus: GPUs.

    Raises:
        UserError: If a DeepSpeed JSON that it names cannot be read.
    """
    path = strategy if isinstance(strategy, str) else str(_get(strategy, "class_path", ""))
    name, options = path.rpartition(".")[2].lower(), _get(strategy, "init_args", None)
    if "deepspeed" in name:
        return _zero_of(name, options, num_gpus)
    if "fsdp" in name or "modelparallel" in name:
        offload = name.endswith("offload") or bool(_get(options, "offload", False))
        return fsdp2(num_gpus, int(_get(options, "replicas", 1)), offload=offload)
    if num_gpus == 1:
        return Sharding("one GPU")
    return Sharding("DDP: every GPU has all of it", "ddp")


def _zero_of(name: str, options: Any, num_gpus: int) -> Sharding:
    """Return what a DeepSpeed strategy divides, from its name, its keys or its JSON."""
    config = _get(options, "config", None)
    if config is not None:
        section = (config if isinstance(config, Mapping) else read_config(config)).get("zero_optimization", {})
        return zero(
            num_gpus,
            int(section.get("stage", 0)),
            offload_optimizer=_is_offloaded(section.get("offload_optimizer")),
            offload_parameters=_is_offloaded(section.get("offload_param")),
        )
    named = re.search(r"stage_(\d)(_offload)?", name)
    stage = int(named[1]) if named else int(_get(options, "stage", None) or 2)
    offloaded = bool(named and named[2])
    return zero(
        num_gpus,
        stage,
        offload_optimizer=offloaded or _get(options, "offload_optimizer", None) is not None,
        offload_parameters=(offloaded and stage == 3) or _get(options, "offload_parameters", None) is not None,
    )


def _is_offloaded(section: Any) -> bool:
    return (section or {}).get("device", "none") not in ("none", None)


def _get(value: Any, key: str, default: Any) -> Any:
    return default if value is None or isinstance(value, str) else value.get(key, default)
