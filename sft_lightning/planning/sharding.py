"""What a strategy divides among GPUs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sharding:
    """How many GPUs share each part; 1 where every GPU has all of it."""

    name: str
    weights: int = 1
    gradients: int = 1
    optimizer: int = 1


def sharding_of(strategy: Any, num_gpus: int) -> Sharding:
    """Return what `trainer.strategy` divides.

    FSDP and ZeRO-3 divide everything, ZeRO-2 gradients and optimizer states, ZeRO-1 the optimizer states (Rajbhandari
    et al., 2019, arXiv:1910.02054); every other strategy nothing.

    Args:
        strategy: A name, or a class path with arguments.
        num_gpus: GPUs.
    """
    if num_gpus == 1:
        return Sharding("one GPU")
    path = strategy if isinstance(strategy, str) else str(_get(strategy, "class_path", ""))
    name = path.rpartition(".")[2].lower()
    if "fsdp" in name or "modelparallel" in name:
        return Sharding("FSDP", num_gpus, num_gpus, num_gpus)
    if "deepspeed" in name:
        stage = _stage(name, _get(strategy, "init_args", None))
        return Sharding(
            f"ZeRO-{stage}",
            num_gpus if stage >= 3 else 1,
            num_gpus if stage >= 2 else 1,
            num_gpus if stage >= 1 else 1,
        )
    return Sharding("every GPU has all of it")


def _stage(name: str, options: Any) -> int:
    named = re.search(r"stage_(\d)", name)
    return int(named[1]) if named else int(_get(options, "stage", None) or 2)  # Lightning's default is stage 2


def _get(value: Any, key: str, default: Any) -> Any:
    return default if value is None or isinstance(value, str) else value.get(key, default)
