"""Estimate steps, memory by part and time of a run before it starts; needs neither a GPU nor weights."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from sft_lightning.cli.configuration import parse_configuration
from sft_lightning.errors import UserError

if TYPE_CHECKING:
    from sft_lightning.data.datamodule import SFTDataModule
    from sft_lightning.estimation.inputs import PlanInputs

_UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6, "TiB": 2**40}


def main(args: Sequence[str]) -> None:
    """Print the plan of a run."""
    inputs = plan_inputs(args)
    _read(inputs.data)
    from sft_lightning.estimation.report import plan_lines

    for text in plan_lines(inputs):
        print(text)


def plan_inputs(args: Sequence[str]) -> PlanInputs:
    """Return the inputs of the plan that a command line describes; no data is read.

    Args:
        args: Command-line arguments after `plan`.

    Raises:
        UserError: If `fit` would refuse the configuration before it reads any weight, or an option is out of range.
    """
    line = parse_configuration("plan", __doc__, args, _add_options)
    from sft_lightning.data.plan.epoch_plan import Topology
    from sft_lightning.estimation.inputs import PlanInputs, check_as_fit
    from sft_lightning.strategies.refusals import RunFacts

    data, config = line.data, line.config
    trainer = line.config_init["trainer"]
    given = config["num_gpus"]
    if given is not None and given < 1:
        raise UserError(f"--num_gpus: must be at least 1 (got {given})")
    if not 0 < config["mfu"] <= 1:
        raise UserError(f"--mfu: must be above 0 and at most 1 (got {config['mfu']})")
    if given is not None:
        accumulate = data.topology.accumulate
        data.topology = Topology(batch_size=data.spec.batch_size, accumulate=accumulate, world_size=given)
    strategy, precision = trainer["strategy"], _precision(trainer["precision"])
    check_as_fit(
        strategy,
        RunFacts(
            model=line.spec,
            precision=precision,
            num_processes=data.topology.world_size,
            on_gpu=trainer["accelerator"] != "cpu" or given is not None,
        ),
    )
    return PlanInputs(
        spec=line.spec,
        data=data,
        strategy=strategy,
        gradient_clip_val=trainer["gradient_clip_val"] or 0.0,
        precision=precision,
        num_epochs=_epochs(trainer),
        max_steps=trainer["max_steps"],
        gpu_bytes=None if config["gpu_memory"] is None else parse_memory(config["gpu_memory"]),
        mfu=config["mfu"],
        tflops=config["tflops"],
    )


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--num_gpus",
        type=int | None,
        default=None,
        help="Number of GPUs of all nodes together (default: trainer.devices × trainer.num_nodes).",
    )
    parser.add_argument("--gpu_memory", type=str | None, default=None, help="Memory of a GPU, such as 48GiB.")
    parser.add_argument("--mfu", type=float, default=0.4, help="Share of --tflops that training reaches, 0 to 1 (MFU).")
    parser.add_argument(
        "--tflops",
        type=float,
        default=312.0,
        help="Peak of a GPU, in TFLOP/s (default: an A100).",
    )


def _read(data: SFTDataModule) -> None:
    if not data.spec.sources:
        raise UserError("data.sources: no source given; plan needs at least one")
    if data.spec.streams:
        raise UserError("data.sources: streamed sources cannot be planned; remove `streaming`")
    data.prepare()


def _precision(value: Any) -> str:
    short = {"bf16": "bf16-mixed", "16": "16-mixed", "32": "32-true", "None": "32-true"}
    return short.get(str(value), str(value))


def _epochs(trainer: Any) -> int:
    epochs = trainer["max_epochs"]
    return 1 if epochs is None or epochs < 1 else int(epochs)


def parse_memory(text: str) -> float:
    """Return an amount of memory in bytes, from text such as `48GiB`, `80 GB` or `24` (GiB).

    Raises:
        UserError: If the text is not an amount of memory.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in _UNITS.items()} | {"": 2**30}
    if found is None or found[2].lower() not in units or not math.isfinite(_number(found[1])):
        raise UserError(f"--gpu_memory: {text!r} is not an amount of memory; write 48GiB or 80GB")
    size = _number(found[1]) * units[found[2].lower()]
    if size <= 0:
        raise UserError(f"--gpu_memory: must be above 0 (got {text!r})")
    return size


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
