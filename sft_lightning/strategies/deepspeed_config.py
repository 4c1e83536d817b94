"""DeepSpeed's configuration as a dict: from our keys or from a user's JSON, agreeing with the YAML or refused.

The YAML decides on optimizer, schedule, batch sizes, clipping and precision; a JSON may repeat what it says or leave it
to us (`auto`, as the Hugging Face Trainer writes it), and may not say otherwise. Keys: DeepSpeed's docs/config-json.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sft_lightning.errors import UserError

AUTO = "auto"
OffloadDevice = Literal["cpu", "nvme"]

_PRECISIONS = {
    "bf16": ("bf16-mixed", "bf16-true"),
    "fp16": ("16-mixed", "16-true"),
}
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_ADAMS = {"adam": "adamw", "adamw": "adamw", "fusedadam": "adamw", "deepspeedcpuadam": "adamw"}
"""DeepSpeed's Adam decays weights as AdamW does, unless `adam_w_mode` says no."""


@dataclass(frozen=True, kw_only=True)
class ZeroOptions:
    """What our own keys say of ZeRO (Rajbhandari et al., 2019, arXiv:1910.02054).

    Raises:
        UserError: If the stage is none of 0..3, or something is offloaded that the stage does not shard.
    """

    stage: int = 2
    """0 shards nothing, 1 the optimizer's state, 2 gradients too, 3 weights too."""

    offload_optimizer: OffloadDevice | None = None
    """Where the optimizer's state and its step go."""

    offload_parameters: OffloadDevice | None = None
    """Where weights wait; stage 3."""

    nvme_path: str | None = None
    """Folder on a local disk for what is offloaded to NVMe."""

    quantized_weights: bool = False
    """ZeRO++ (Wang et al., 2023, arXiv:2306.10209): gather weights as int8; stage 3."""

    quantized_gradients: bool = False
    """ZeRO++: reduce gradients as int4 and int8, between nodes and within; stage 3, and GPUs."""

    hpz_partition_size: int = 1
    """ZeRO++: processes of a secondary partition, those of a node; 1 for none; stage 3."""

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise UserError(f"trainer.strategy.stage: must be 0, 1, 2 or 3 (got {self.stage})")
        if self.offload_optimizer and self.stage == 0:
            raise UserError("trainer.strategy.offload_optimizer: stage 0 shards no optimizer state; set stage 2")
        of_stage_3 = {
            "offload_parameters": self.offload_parameters is not None,
            "quantized_weights": self.quantized_weights,
            "quantized_gradients": self.quantized_gradients,
            "hpz_partition_size": self.hpz_partition_size > 1,
        }
        for key, wanted in of_stage_3.items():
            if wanted and self.stage != 3:
                raise UserError(f"trainer.strategy.{key}: is of ZeRO-3, and stage is {self.stage}; set stage: 3")
        if self.hpz_partition_size < 1:
            raise UserError(f"trainer.strategy.hpz_partition_size: must be at least 1 (got {self.hpz_partition_size})")
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and self.nvme_path is None:
            raise UserError("trainer.strategy.nvme_path: needed to offload to nvme; name a folder on a local disk")


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


def from_options(options: ZeroOptions) -> dict[str, Any]:
    """Return the `zero_optimization` that our keys describe, in a configuration of its own."""
    zero: dict[str, Any] = {"stage": options.stage}
    if options.stage >= 1:
        zero |= {"contiguous_gradients": True, "overlap_comm": True}
    if options.offload_optimizer:
        zero["offload_optimizer"] = _offload(options.offload_optimizer, options.nvme_path)
    if options.offload_parameters:
        zero["offload_param"] = _offload(options.offload_parameters, options.nvme_path)
    if options.quantized_weights:
        zero["zero_quantized_weights"] = True
    if options.quantized_gradients:
        zero["zero_quantized_gradients"] = True
    if options.hpz_partition_size > 1:
        zero["zero_hpz_partition_size"] = options.hpz_partition_size
    if options.stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True}


def _offload(device: OffloadDevice, nvme_path: str | None) -> dict[str, Any]:
    return {"device": "cpu", "pin_memory": True} if device == "cpu" else {"device": "nvme", "nvme_path": nvme_path}


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


def resolve(config: Mapping[str, Any], yaml: FromYaml, *, source: str) -> dict[str, Any]:
    """Return the configuration that DeepSpeed gets: all that the YAML says filled in, every `auto` resolved.

    Args:
        config: The user's JSON, or `from_options`.
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
    if offloads_optimizer(resolved):
        resolved.setdefault("zero_force_ds_cpu_optimizer", True)
    cleaned: dict[str, Any] = _without_auto(resolved)
    return cleaned


def offloads_optimizer(config: Mapping[str, Any]) -> bool:
    """Whether the optimizer's step is taken on the host, which wants `DeepSpeedCPUAdam`."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") not in ("none", None)


def uses_nvme(config: Mapping[str, Any]) -> bool:
    """Whether anything is offloaded to NVMe, which wants DeepSpeed's `async_io`."""
    zero = config.get("zero_optimization", {})
    return any((zero.get(key) or {}).get("device") == "nvme" for key in ("offload_optimizer", "offload_param"))


def check_sense(config: Mapping[str, Any], *, world_size: int, on_gpu: bool, source: str) -> None:
    """Check what ZeRO++ (Wang et al., 2023, arXiv:2306.10209) asks of the machine.

    Args:
        config: DeepSpeed's configuration.
        world_size: Processes.
        on_gpu: Whether they compute on GPUs.
        source: Name of the JSON, for errors.

    Raises:
        UserError: If the stage is below 3, the secondary partition does not divide the processes, or something that is
            quantized on the way would be so by the CPU.
    """
    zero = config.get("zero_optimization", {})
    quantized = [key for key in ("zero_quantized_weights", "zero_quantized_gradients") if zero.get(key) is True]
    partition = zero.get("zero_hpz_partition_size", 1)
    asked = [*quantized, *(["zero_hpz_partition_size"] if partition not in (1, AUTO) else [])]
    if asked and stage_of(config) != 3:
        raise UserError(f"{source}: {asked[0]} is of ZeRO-3, and the stage is {stage_of(config)}; set stage 3")
    if partition not in (1, AUTO) and world_size % partition:
        raise UserError(
            f"{source}: zero_hpz_partition_size {partition} does not divide the {world_size} processes; set it to the "
            "number of GPUs of a node"
        )
    if quantized and not on_gpu:
        raise UserError(f"{source}: {quantized[0]} needs CUDA kernels, and this run is on the CPU; remove it")


def stage_of(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a configuration; 0 where it says nothing."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


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
