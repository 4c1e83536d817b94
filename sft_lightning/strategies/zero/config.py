"""DeepSpeed's configuration as a dict: read from a user's JSON, filled in from the YAML, or refused where they differ.

The YAML decides on optimizer, schedule, batch sizes, clipping and precision; a JSON may repeat what it says or leave it
to us (`auto`, as the Hugging Face Trainer writes it), and may not say otherwise. Keys: DeepSpeed's docs/config-json.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sft_lightning.errors import UserError
from sft_lightning.strategies.zero.options import OFFLOAD_OPTIMIZER, ZeroOptions, from_options, offload_of

AUTO = "auto"

_PRECISIONS = {
    "bf16": ("bf16-mixed", "bf16-true"),
    "fp16": ("16-mixed", "16-true"),
}
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_ADAMS = {"adam": "adamw", "adamw": "adamw", "fusedadam": "adamw", "deepspeedcpuadam": "adamw"}
"""DeepSpeed's Adam decays weights as AdamW does, unless `adam_w_mode` says no."""


@dataclass(frozen=True, kw_only=True)
class FromYaml:
    """What the YAML says of things that a DeepSpeed JSON can say too."""

    optimizer: str
    """Class name of `model.optimizer`, such as `AdamW`."""

    lr: float
    """Its learning rate."""

    weight_decay: float
    """Its weight decay."""

    schedule: str
    """`model.lr_scheduler.name`."""

    batch_size: int
    """`data.batch_size`: rows per micro-batch and device."""

    accumulate: int
    """`trainer.accumulate_grad_batches`."""

    world_size: int
    """Processes."""

    gradient_clip_val: float
    """`trainer.gradient_clip_val`; 0 for none."""

    precision: str
    """`trainer.precision`."""


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Raises:
        UserError: If there is no such file, or it is not a JSON object.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"trainer.strategy.config: the file {str(path)!r} does not exist (looked in {Path.cwd()})")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: must hold a JSON object, found a {type(content).__name__}")
    return content


def asked_config(options: ZeroOptions, config: str | dict[str, Any] | None) -> dict[str, Any]:
    """Return the configuration that our keys describe, or the JSON or dict that stands in their place.

    Raises:
        UserError: If there are both.
    """
    if config is None:
        return from_options(options)
    beside = [field.name for field in fields(options) if getattr(options, field.name) != field.default]
    if beside:
        raise UserError(f"trainer.strategy.config: says it all, so there is no place for {', '.join(beside)}")
    return read_config(config) if isinstance(config, str) else config


def resolve(config: Mapping[str, Any], yaml: FromYaml, *, source: str) -> dict[str, Any]:
    """Return the configuration that DeepSpeed gets: all that the YAML says filled in, every `auto` resolved.

    Args:
        config: The user's JSON, or `zero_options.from_options`.
        yaml: What the YAML says.
        source: Name of the JSON, for errors.

    Raises:
        UserError: If the two contradict each other; all contradictions at once.
    """
    conflicts = [*_optimizer(config, yaml), *_schedule(config, yaml), *_sizes(config, yaml), *_precision(config, yaml)]
    if conflicts:
        raise UserError(f"{source} contradicts the YAML: {'; '.join(conflicts)}; change one of the two, or remove it")
    resolved = copy.deepcopy(dict(config))
    for key in ("optimizer", "scheduler", "fp16", "bf16", *_size_values(yaml)):
        resolved.pop(key, None)  # the YAML's, which are the same
    resolved |= {"train_micro_batch_size_per_gpu": yaml.batch_size, "gradient_accumulation_steps": yaml.accumulate}
    if yaml.gradient_clip_val:
        resolved["gradient_clipping"] = yaml.gradient_clip_val
    for block, precisions in _PRECISIONS.items():
        if yaml.precision in precisions:
            given = {key: value for key, value in config.get(block, {}).items() if value != AUTO}
            resolved[block] = {**given, "enabled": True}
    resolved.setdefault("zero_allow_untested_optimizer", True)
    if offload_of(resolved, OFFLOAD_OPTIMIZER):
        resolved.setdefault("zero_force_ds_cpu_optimizer", True)
    cleaned: dict[str, Any] = _without_auto(resolved)
    return cleaned


def _differs(value: Any, expected: float) -> bool:
    return value is not None and value != AUTO and float(value) != float(expected)


def _optimizer(config: Mapping[str, Any], yaml: FromYaml) -> list[str]:
    section = config.get("optimizer")
    if section is None:
        return []
    params = section.get("params", {})
    name, wanted = str(section.get("type", AUTO)), yaml.optimizer.lower()
    kind = _ADAMS.get(name.lower(), name.lower()) if params.get("adam_w_mode", True) else name.lower()
    found = []
    if name != AUTO and kind != _ADAMS.get(wanted, wanted):
        found.append(f"optimizer.type is {name}, model.optimizer is {yaml.optimizer}")
    for key, expected in {"lr": yaml.lr, "weight_decay": yaml.weight_decay}.items():
        if _differs(params.get(key), expected):
            found.append(f"optimizer.params.{key} is {params[key]}, model.optimizer.init_args.{key} is {expected}")
    return found


def _schedule(config: Mapping[str, Any], yaml: FromYaml) -> list[str]:
    section = config.get("scheduler")
    if section is None or section.get("type", AUTO) == AUTO:
        return []
    name = section["type"]
    if _SCHEDULES.get(name) == yaml.schedule:
        return []
    same = f" (which is {_SCHEDULES[name]!r})" if name in _SCHEDULES else ""
    return [f"scheduler.type is {name}{same}, model.lr_scheduler.name is {yaml.schedule!r}"]


def _size_values(yaml: FromYaml) -> dict[str, tuple[str, float]]:
    """Key of the JSON → key of the YAML, and its value."""
    rows = yaml.batch_size * yaml.accumulate * yaml.world_size
    return {
        "train_micro_batch_size_per_gpu": ("data.batch_size", yaml.batch_size),
        "gradient_accumulation_steps": ("trainer.accumulate_grad_batches", yaml.accumulate),
        "train_batch_size": ("data.batch_size × trainer.accumulate_grad_batches × processes", rows),
        "gradient_clipping": ("trainer.gradient_clip_val", yaml.gradient_clip_val),
    }


def _sizes(config: Mapping[str, Any], yaml: FromYaml) -> list[str]:
    return [
        f"{key} is {config[key]}, {name} is {expected}"
        for key, (name, expected) in _size_values(yaml).items()
        if _differs(config.get(key), expected)
    ]


def _precision(config: Mapping[str, Any], yaml: FromYaml) -> list[str]:
    found = []
    for block, precisions in _PRECISIONS.items():
        enabled = config.get(block, {}).get("enabled", AUTO)
        if enabled != AUTO and bool(enabled) != (yaml.precision in precisions):
            found.append(f"{block}.enabled is {str(enabled).lower()}, trainer.precision is {yaml.precision!r}")
    return found


def _without_auto(value: Any) -> Any:
    """Leave out every key whose value is `auto`: DeepSpeed knows only numbers, and has defaults."""
    if isinstance(value, Mapping):
        return {key: _without_auto(each) for key, each in value.items() if each != AUTO}
    return value
