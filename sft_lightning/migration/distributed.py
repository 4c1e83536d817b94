"""Translate launchers, DeepSpeed and FSDP options into `trainer.devices` and `trainer.strategy`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sft_lightning.errors import UserError
from sft_lightning.migration.draft import Draft
from sft_lightning.migration.options import Options

_COUNTS = {
    "num_gpus": "devices",
    "nproc_per_node": "devices",
    "num_processes": "devices",
    "num_nodes": "num_nodes",
    "nnodes": "num_nodes",
    "num_machines": "num_nodes",
}
"""Options of launchers that count → keys under `trainer`."""

_ZERO = "sft_lightning.strategies.DeepSpeedZeRO"
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


def strategy(options: Options, draft: Draft, *, quantized: bool) -> None:
    """Set the number of devices, and the strategy that DeepSpeed or FSDP options describe.

    Args:
        options: Options of the system.
        draft: The YAML.
        quantized: Whether the base is quantized.
    """
    devices(options, draft)
    bits = draft.values.get("model.quantization", {}).get("bits") if quantized else None
    if options.text("deepspeed"):
        _deepspeed(options, draft, bits)
    elif options.words("fsdp"):
        _fsdp(options, draft, bits)
    elif options.has("ddp_find_unused_parameters") and options.flag("ddp_find_unused_parameters"):
        draft.set("trainer.strategy", "ddp_find_unused_parameters_true")


def devices(options: Options, draft: Draft) -> None:
    """Set how many processes the launcher starts, and note its options that have no key.

    Args:
        options: Options of the system, with those of its launcher.
        draft: The YAML.
    """
    for name, words in options.launcher.items():
        value = " ".join(words)
        option = f"--{name} {value}".strip()
        if name in _COUNTS and value.isdigit():
            draft.set(f"trainer.{_COUNTS[name]}", int(value))
        elif name in _COUNTS:
            draft.omit(option, f"not a number; set trainer.{_COUNTS[name]}")
        elif name == "include" and (found := re.fullmatch(r"[\w.-]+:(\d+(?:,\d+)*)", value)):
            draft.set("trainer.devices", [int(number) for number in found[1].split(",")], f"from {option}")
        elif name in ("hostfile", "include", "exclude"):
            draft.omit(option, "set trainer.num_nodes, and start the command on each node with torchrun")
        else:
            draft.omit(option, "an option of the launcher; give it to torchrun, which starts this trainer too")


def _set_sharding(draft: Draft, value: Any, bits: int | None, comment: str) -> None:
    """Set a strategy that shards the weights; a base in 8 bits cannot be sharded."""
    if bits == 8:
        draft.omit(f"strategy {value}", "an 8-bit base cannot be sharded; with ddp each GPU holds a copy")
    else:
        draft.set("trainer.strategy", value, "the 4-bit base is sharded too" if bits == 4 else comment)


def stage_name(stage: int, *, offload: bool) -> str | None:
    """Return the name of the strategy for a ZeRO stage; `None` for stage 0.

    Args:
        stage: 0 to 3.
        offload: Whether optimizer state or weights are offloaded to the CPU.
    """
    if stage == 0:
        return None
    return f"deepspeed_stage_{stage}{'_offload' if offload else ''}"


def _deepspeed(options: Options, draft: Draft, bits: int | None) -> None:
    file = Path(options.text("deepspeed") or "")
    if file.is_file():
        _deepspeed_json(file, options, draft, bits)
        return
    guess = re.search(r"(?:zero|stage|[sz])_?(\d)", file.stem)
    stage = int(guess[1]) if guess else None
    if stage not in (0, 1, 2, 3):
        draft.omit(f"--deepspeed {file}", "the file does not exist and its name has no stage; set trainer.strategy")
        return
    name = stage_name(stage, offload="offload" in file.stem and "no_offload" not in file.stem)
    comment = f"from the name {file.name}; the file does not exist, so check offloading"
    if name is not None:
        _set_sharding(draft, name, bits if stage == 3 else None, comment)


def _deepspeed_json(file: Path, options: Options, draft: Draft, bits: int | None) -> None:
    """Use the JSON as it is: offloading, ZeRO++, buckets and loss scaling stay what they are there."""
    content = _json(file)
    stage = content.get("zero_optimization", {}).get("stage", 0)
    value = {"class_path": _ZERO, "init_args": {"config": str(file)}}
    _set_sharding(draft, value, bits if stage == 3 else None, "the JSON itself; `auto` in it is taken from this YAML")
    _scheduler(content.get("scheduler", {}), options, draft)


def _scheduler(section: dict[str, Any], options: Options, draft: Draft) -> None:
    """Set the schedule of the JSON, which overrides `--lr_scheduler_type` under the Hugging Face Trainer."""
    name = section.get("type", "auto")
    if name == "auto":
        return
    if name not in _SCHEDULES:
        draft.omit(
            f"scheduler {name} of the DeepSpeed JSON", "not available; set model.lr_scheduler, and remove it there"
        )
        return
    draft.set("model.lr_scheduler.name", _SCHEDULES[name], f"{name} of the DeepSpeed JSON, which wins in the original")
    if options.has("lr_scheduler_type"):
        draft.omit(options.as_written("lr_scheduler_type"), f"the DeepSpeed JSON's {name} wins in the original")
    params = section.get("params", {})
    steps = params.get("warmup_num_steps", "auto")
    if steps != "auto":
        draft.drop("model.lr_scheduler.warmup_ratio")
        draft.set("model.lr_scheduler.warmup_steps", int(steps), "warmup_num_steps of the DeepSpeed JSON")
    if name != "WarmupCosineLR" and params.get("warmup_type", "log") == "log":
        draft.omit("warmup_type: log of the DeepSpeed JSON", "the warm-up is linear here")


def _fsdp(options: Options, draft: Draft, bits: int | None) -> None:
    words = " ".join(options.words("fsdp")).split()
    if "full_shard" not in words:
        draft.omit(options.as_written("fsdp"), "only full_shard is migrated; see docs/scaling.md")
        return
    _set_sharding(draft, "fsdp2_offload" if "offload" in words else "fsdp2", bits, "")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: invalid JSON: {error.msg}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object (found a {type(content).__name__})")
    return content
