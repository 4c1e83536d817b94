"""DeepSpeed's configuration as a dict: read from a user's JSON, checked against the YAML, and filled in from it.

The YAML decides optimizer, schedule, batch sizes, clipping and precision. A JSON may repeat these settings or leave
them open (`auto`, as for the Hugging Face Trainer); any other value is an error. Keys: DeepSpeed's docs/config-json.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from sft_lightning.errors import UserError
from sft_lightning.strategies.zero.options import OFFLOAD_OPTIMIZER, ZeroOptions, config_of, offload_block

AUTO = "auto"

_PRECISIONS = {
    "bf16": ("bf16-mixed", "bf16-true"),
    "fp16": ("16-mixed", "16-true"),
}
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_ADAMS = {"adam": "adamw", "adamw": "adamw", "fusedadam": "adamw", "deepspeedcpuadam": "adamw"}
"""Names of DeepSpeed's Adam, which decays weights as AdamW does unless `adam_w_mode` is false."""


@dataclass(frozen=True, kw_only=True)
class YamlSettings:
    """The settings that both the YAML and a DeepSpeed JSON can have."""

    schedule: str
    """`model.lr_scheduler.name`."""

    batch_size: int
    """`data.batch_size`: rows per micro-batch and device."""

    accumulate: int
    """`trainer.accumulate_grad_batches`."""

    world_size: int
    """Number of processes."""

    gradient_clip_val: float
    """`trainer.gradient_clip_val`; 0 for no clipping."""

    precision: str
    """`trainer.precision` in its long form, such as `bf16-mixed`."""

    optimizer: str | None = None
    """Class name of `model.optimizer`, such as `AdamW`; `None` before it is made."""

    lr: float = 0.0
    """Its learning rate."""

    weight_decay: float = 0.0
    """Its weight decay."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    """All its arguments, such as `betas` and `eps`."""

    warmup_steps: int | None = None
    """Warm-up of `model.lr_scheduler` in optimizer steps; `None` if it is not known yet."""

    min_lr_ratio: float = 0.0
    """`model.lr_scheduler.min_lr_ratio`."""

    num_steps: int | None = None
    """Planned optimizer steps; `None` if they are not known yet."""

    def with_optimizer(self, optimizer: Optimizer) -> YamlSettings:
        """Return the settings with those of the optimizer that the YAML has made."""
        values = optimizer.defaults
        return replace(
            self,
            optimizer=type(optimizer).__name__,
            lr=values.get("lr", 0.0),
            weight_decay=values.get("weight_decay", 0.0),
            arguments=values,
        )


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Raises:
        UserError: If the file does not exist, or does not hold a JSON object.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"trainer.strategy.config: the file {str(path)!r} does not exist (looked in {Path.cwd()})")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}, column {error.colno}: invalid JSON: {error.msg}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: must hold a JSON object (found a {type(content).__name__})")
    return content


def user_config(options: ZeroOptions, config: str | dict[str, Any] | None) -> dict[str, Any]:
    """Return the configuration that the keys under `trainer.strategy` describe, or `config` if it is given.

    Args:
        options: The keys.
        config: Path of a DeepSpeed JSON, or its content.

    Raises:
        UserError: If `config` is combined with other keys.
    """
    if config is None:
        return config_of(options)
    others = [field.name for field in fields(options) if getattr(options, field.name) != field.default]
    if others:
        names = ", ".join(f"`{name}`" for name in others)
        raise UserError(
            f"trainer.strategy.config: cannot be combined with {names}; set {'it' if len(others) == 1 else 'them'} in "
            "the DeepSpeed config"
        )
    return read_config(config) if isinstance(config, str) else config


def resolve(config: Mapping[str, Any], yaml: YamlSettings, *, source: str) -> dict[str, Any]:
    """Return the configuration for DeepSpeed: the settings of the YAML filled in, and every `auto` resolved.

    Args:
        config: The user's configuration.
        yaml: The settings of the YAML.
        source: Name of the JSON, for errors.

    Raises:
        UserError: If the two contradict each other; the message names all contradictions.
    """
    conflicts = [
        *_optimizer_conflicts(config, yaml),
        *_schedule_conflicts(config, yaml),
        *_size_conflicts(config, yaml),
        *_precision_conflicts(config, yaml),
    ]
    if conflicts:
        raise UserError(
            f"{source} contradicts the YAML: {'; '.join(conflicts)}; use the same values, or remove them from the "
            "DeepSpeed config"
        )
    resolved = copy.deepcopy(dict(config))
    for key in ("optimizer", "scheduler", "fp16", "bf16", *_size_values(yaml)):
        resolved.pop(key, None)  # the YAML has the same values
    resolved |= {"train_micro_batch_size_per_gpu": yaml.batch_size, "gradient_accumulation_steps": yaml.accumulate}
    if yaml.gradient_clip_val:
        resolved["gradient_clipping"] = yaml.gradient_clip_val
    for block, precisions in _PRECISIONS.items():
        if yaml.precision in precisions:
            given = {key: value for key, value in config.get(block, {}).items() if value != AUTO}
            resolved[block] = {**given, "enabled": True}
    resolved.setdefault("zero_allow_untested_optimizer", True)
    if offload_block(resolved, OFFLOAD_OPTIMIZER):
        resolved.setdefault("zero_force_ds_cpu_optimizer", True)
    cleaned: dict[str, Any] = _without_auto(resolved)
    return cleaned


def _differs(value: Any, expected: Any) -> bool:
    """Whether a JSON's value is another number, or list of numbers, than the YAML's; `auto` is none."""
    if value is None or value == AUTO:
        return False
    if isinstance(value, list) and isinstance(expected, list | tuple):
        return len(value) != len(expected) or any(map(_differs, value, expected))
    try:
        return float(value) != float(expected)
    except (TypeError, ValueError):
        return bool(value != expected)


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _optimizer_conflicts(config: Mapping[str, Any], yaml: YamlSettings) -> list[str]:
    section = config.get("optimizer")
    if section is None or yaml.optimizer is None:
        return []
    params = section.get("params", {})
    name, wanted = str(section.get("type", AUTO)), yaml.optimizer.lower()
    kind = _ADAMS.get(name.lower(), name.lower()) if params.get("adam_w_mode", True) else name.lower()
    found = []
    if name != AUTO and kind != _ADAMS.get(wanted, wanted):
        found.append(f"optimizer.type is {name}, model.optimizer is {yaml.optimizer}")
    known = {**yaml.arguments, "lr": yaml.lr, "weight_decay": yaml.weight_decay}
    for key, value in params.items():
        if key in known and _differs(value, known[key]):
            found.append(f"optimizer.params.{key} is {value}, model.optimizer.init_args.{key} is {_shown(known[key])}")
    return found


def _schedule_conflicts(config: Mapping[str, Any], yaml: YamlSettings) -> list[str]:
    section = config.get("scheduler")
    if section is None or section.get("type", AUTO) == AUTO:
        return []
    name = section["type"]
    if _SCHEDULES.get(name) == yaml.schedule:
        return _warmup_conflicts(section.get("params", {}), yaml)
    same = f" (which is {_SCHEDULES[name]!r})" if name in _SCHEDULES else ""
    return [f"scheduler.type is {name}{same}, model.lr_scheduler.name is {yaml.schedule!r}"]


def _warmup_conflicts(params: Mapping[str, Any], yaml: YamlSettings) -> list[str]:
    """Compare the parameters that DeepSpeed's schedules have (deepspeed/runtime/lr_schedules.py)."""
    lr = None if yaml.optimizer is None else yaml.lr
    wanted: dict[str, tuple[str, Any]] = {
        "warmup_max_lr": ("model.optimizer.init_args.lr", lr),
        "warmup_min_lr": ("the rate that model.lr_scheduler warms up from", 0.0),
        "warmup_min_ratio": ("the share of the rate that model.lr_scheduler warms up from", 0.0),
        "warmup_num_steps": ("the warm-up of model.lr_scheduler", yaml.warmup_steps),
        "warmup_type": ("the warm-up of model.lr_scheduler", "linear"),
        "total_num_steps": ("the number of planned optimizer steps", yaml.num_steps),
        "cos_min_ratio": ("model.lr_scheduler.min_lr_ratio", yaml.min_lr_ratio),
    }
    return [
        f"scheduler.params.{key} is {params[key]}, {name} is {expected}"
        for key, (name, expected) in wanted.items()
        if expected is not None and _differs(params.get(key), expected)
    ]


def _size_values(yaml: YamlSettings) -> dict[str, tuple[str, float]]:
    """Return key of the JSON → key of the YAML, and its value."""
    rows = yaml.batch_size * yaml.accumulate * yaml.world_size
    return {
        "train_micro_batch_size_per_gpu": ("data.batch_size", yaml.batch_size),
        "gradient_accumulation_steps": ("trainer.accumulate_grad_batches", yaml.accumulate),
        "train_batch_size": ("data.batch_size × trainer.accumulate_grad_batches × processes", rows),
        "gradient_clipping": ("trainer.gradient_clip_val", yaml.gradient_clip_val),
    }


def _size_conflicts(config: Mapping[str, Any], yaml: YamlSettings) -> list[str]:
    return [
        f"{key} is {config[key]}, {name} is {expected}"
        for key, (name, expected) in _size_values(yaml).items()
        if _differs(config.get(key), expected)
    ]


def _precision_conflicts(config: Mapping[str, Any], yaml: YamlSettings) -> list[str]:
    found = []
    for block, precisions in _PRECISIONS.items():
        enabled = config.get(block, {}).get("enabled", AUTO)
        if enabled != AUTO and bool(enabled) != (yaml.precision in precisions):
            found.append(f"{block}.enabled is {str(enabled).lower()}, trainer.precision is {yaml.precision!r}")
    return found


def _without_auto(value: Any) -> Any:
    """Remove every key whose value is `auto`, which DeepSpeed does not know; it has defaults."""
    if isinstance(value, Mapping):
        return {key: _without_auto(each) for key, each in value.items() if each != AUTO}
    return value
