"""Translate launchers, DeepSpeed and FSDP options into `trainer.devices` and `trainer.strategy`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sft_lightning.errors import UserError
from sft_lightning.migration.draft import Draft
from sft_lightning.migration.options import Options


def strategy(options: Options, draft: Draft, *, quantized: bool) -> None:
    """Set the number of devices, and the strategy that DeepSpeed or FSDP options describe.

    Args:
        options: Options of the system.
        draft: The YAML.
        quantized: Whether the base is quantized.
    """
    devices(options, draft)
    name = _deepspeed(options, draft) if options.text("deepspeed") else _fsdp(options, draft)
    if name and quantized and name.startswith(("fsdp2", "deepspeed_stage_3")):
        if draft.values.get("model.quantization", {}).get("bits") == 4:
            draft.set("trainer.strategy", name, "the 4-bit base is sharded too")
        else:
            draft.omit(f"strategy {name}", "an 8-bit base cannot be sharded; with ddp each GPU holds a copy")
    elif name:
        draft.set("trainer.strategy", name, draft.comments.pop("trainer.strategy", ""))
    elif options.has("ddp_find_unused_parameters") and options.flag("ddp_find_unused_parameters"):
        draft.set("trainer.strategy", "ddp_find_unused_parameters_true")


def devices(options: Options, draft: Draft) -> None:
    """Set how many processes the launcher starts.

    Args:
        options: Options of the system, with those of its launcher.
        draft: The YAML.
    """
    for name, key in {
        "num_gpus": "devices",
        "nproc_per_node": "devices",
        "num_processes": "devices",
        "num_nodes": "num_nodes",
        "nnodes": "num_nodes",
        "num_machines": "num_nodes",
    }.items():
        count = next(iter(options.launcher.get(name, [])), "")
        if count.isdigit():
            draft.set(f"trainer.{key}", int(count))
        elif count:
            draft.omit(f"--{name} {count}", f"not a number; set trainer.{key}")


def stage_name(stage: int, *, offload: bool) -> str | None:
    """Return the name of the strategy for a ZeRO stage; `None` for stage 0.

    Args:
        stage: 0 to 3.
        offload: Whether optimizer state or weights are offloaded to the CPU.
    """
    if stage == 0:
        return None
    return f"deepspeed_stage_{stage}{'_offload' if offload else ''}"


def _deepspeed(options: Options, draft: Draft) -> str | None:
    file = options.text("deepspeed") or ""
    path = Path(file)
    zero: dict[str, Any] = {}
    if path.is_file():
        zero = _zero_section(path)
    guess = re.search(r"(?:zero|stage|[sz])_?(\d)", path.stem)
    stage = zero.get("stage") if zero else int(guess[1]) if guess else None
    if stage not in (0, 1, 2, 3):
        draft.omit(f"--deepspeed {file}", "the file does not exist and its name has no stage; set trainer.strategy")
        return None
    offload = any(
        zero.get(f"offload_{part}", {}).get("device", "none") != "none" for part in ("optimizer", "param")
    ) or (not zero and "offload" in file and "no_offload" not in file)
    source = f"from {path.name}" if zero else f"from the name {path.name}; the file does not exist, so check offloading"
    draft.comments["trainer.strategy"] = source
    return stage_name(stage, offload=offload)


def _fsdp(options: Options, draft: Draft) -> str | None:
    words = " ".join(options.words("fsdp")).split()
    if not words:
        return None
    if "full_shard" not in words:
        draft.omit(options.as_written("fsdp"), "only full_shard is migrated; see docs/scaling.md")
        return None
    return "fsdp2_offload" if "offload" in words else "fsdp2"


def _zero_section(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: invalid JSON: {error.msg}") from error
    section: dict[str, Any] = content.get("zero_optimization", {})
    return section
