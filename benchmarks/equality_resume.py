"""Compare runs that are continued from a checkpoint with uninterrupted runs.

This file is also the script that `train_together` starts in several processes: torchrun … equality_resume.py JSON
"""

from __future__ import annotations

import json
import logging
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from equality_gradients import RECORDS
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from markdown_table import markdown_table
from tiny_runs import cpu_trainer, run_in_processes

from sft_lightning.compat.lightning.loops import is_accumulating
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.spec import TrainingSpec
from sft_lightning.types import IGNORE_INDEX

ROWS_PER_STEP = 4
STEPS_PER_EPOCH = -(-len(RECORDS) // ROWS_PER_STEP)
NUM_STEPS = 2 * STEPS_PER_EPOCH

MODES = ("full", "lora", "qlora", "int8")

MOMENTS = {
    "first step": 1,
    "mid epoch": 2,
    "after a validation": 3,
    "within an accumulation window": 4,
    "epoch boundary": STEPS_PER_EPOCH,
    "second epoch": STEPS_PER_EPOCH + 2,
    "before the last step": NUM_STEPS - 1,
    "last step": NUM_STEPS,
    "streaming": 5,
}
"""Moments at which runs are interrupted, with their number of optimizer steps. The last one is for streamed data."""

TOLERANCE = 1e-5
"""Largest relative difference of a step's loss if the number of processes changes."""


@dataclass(frozen=True)
class Run:
    """A run to its end."""

    mode: str
    """One of `MODES`."""

    processes: int
    """Number of processes (gloo)."""

    dropout: bool
    """Whether training draws random numbers."""

    moment: str = ""
    """The checkpoint to continue from, a key of `MOMENTS`; empty for an uninterrupted run."""

    started_by: int = 0
    """Number of processes of the interrupted run."""

    streams: bool = False
    """Whether the data is streamed."""

    def folder(self, root: Path) -> Path:
        """Return the folder of the run's files."""
        name = f"{self.mode}_{self.processes}_{self.dropout}_{self.streams}"
        return root / "runs" / (f"{name}_{self.started_by}_{self.moment.replace(' ', '_')}" if self.moment else name)

    @property
    def uninterrupted(self) -> Run:
        """The same run without the interruption."""
        return replace(self, processes=self.started_by or self.processes, moment="", started_by=0)


class Watch(Callback):
    """Saves a checkpoint at every moment, and records each step's loss and rows.

    Args:
        folder: Folder for checkpoints; `None` saves none.
        streams: Whether the data is streamed.
    """

    def __init__(self, folder: Path | None, streams: bool) -> None:
        self.folder, self.streams = folder, streams
        self.losses: dict[int, float] = {}
        self.rows: dict[int, int] = {}
        self._rows = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up a checksum of the step's rows, independent of their order, and save."""
        for labels in batch["labels"]:
            self._rows += zlib.crc32(labels[labels != IGNORE_INDEX].numpy().tobytes())
        accumulating = is_accumulating(trainer)
        if not accumulating:
            reduce = trainer.strategy.reduce
            self.losses[trainer.global_step] = float(reduce(pl_module.step.loss, reduce_op="sum"))  # type: ignore[arg-type]
            self.rows[trainer.global_step] = int(reduce(torch.tensor(self._rows), reduce_op="sum"))
            self._rows = 0
        for moment in ("streaming",) if self.streams else (*MOMENTS,)[:-1]:
            within = moment == "within an accumulation window"
            if moment not in ("after a validation", "epoch boundary") and accumulating is within:
                self._save(trainer, moment)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.streams:
            self._save(trainer, "after a validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.streams:
            self._save(trainer, "epoch boundary")

    def _save(self, trainer: Trainer, moment: str) -> None:
        if self.folder is not None and trainer.global_step == MOMENTS[moment]:
            path = self.folder / f"{moment.replace(' ', '_')}.ckpt"
            if not trainer.strategy.broadcast(path.exists()):  # only after the first micro-batch of a window
                trainer.save_checkpoint(path)


def train(run: Run, model: Path) -> None:
    """Train to the end, and save a checkpoint with the losses and rows of all steps.

    Args:
        run: The run; each of its processes calls this.
        model: Folder that `equality_gradients.save_model` wrote.
    """
    seed_everything(0, verbose=False)
    folder = run.folder(model)
    source = SourceConfig(path=str(model / "records.json"), streaming=run.streams)
    data = SFTDataModule(DataSpec(
        sources={"toy": source}, val_sources={"held": SourceConfig(path=str(model / "records.json"), max_examples=3)},
        template="alpaca", max_length=250, packing="none",
        tokenizer_name_or_path=str(model), store_dir=str(model / "stores"),
    ))  # fmt: skip
    adapter = None if run.mode == "full" else AdapterConfig(r=4, dropout=0.3 if run.dropout else 0.0)
    bits: dict[str, Literal[4, 8]] = {"qlora": 4, "int8": 8}
    module = CausalLMModule(
        TrainingSpec(
            model_name_or_path=str(model), dtype="float32", adapter=adapter,
            dropout=0.1 if run.dropout and run.mode == "full" else None,
            quantization=QuantizationConfig(bits=bits[run.mode]) if run.mode in bits else None,
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        )
    )  # fmt: skip
    watch = Watch(None if run.moment else folder, run.streams)
    accumulate = ROWS_PER_STEP // run.processes
    trainer = cpu_trainer(
        folder, run.processes, max_epochs=-1 if run.streams else 2, max_steps=NUM_STEPS if run.streams else -1,
        accumulate_grad_batches=accumulate, val_check_interval=3 * accumulate, num_sanity_val_steps=0,
        gradient_clip_val=1.0, callbacks=[watch],
    )  # fmt: skip
    saved = run.uninterrupted.folder(model) / f"{run.moment.replace(' ', '_')}.ckpt"
    trainer.fit(module, data, ckpt_path=str(saved) if run.moment else None)
    trainer.save_checkpoint(folder / "end.ckpt")
    if trainer.is_global_zero:
        seen = {"losses": watch.losses, "rows": watch.rows}
        (folder / "seen.json").write_text(json.dumps(seen), encoding="utf-8")


def differences(run: Run, model: Path) -> tuple[list[str], float]:
    """Compare a continued run with the uninterrupted one.

    Args:
        run: The continued run.
        model: Folder that `equality_gradients.save_model` wrote.

    Returns:
        The names of what differs in any bit (steps, rows, losses, weights, optimizer, schedule, random states), and the
        largest relative difference of a step's loss.
    """
    folders = run.folder(model), run.uninterrupted.folder(model)
    (found, expected) = (json.loads((folder / "seen.json").read_text(encoding="utf-8")) for folder in folders)
    (one, other) = (torch.load(folder / "end.ckpt", weights_only=True) for folder in folders)
    left = [step for step in expected["losses"] if int(step) > MOMENTS[run.moment]]
    equal = {
        "steps": list(found["losses"]) == left and one["global_step"] == other["global_step"],
        "rows": all(found["rows"].get(step) == expected["rows"][step] for step in left),
        "losses": all(found["losses"].get(step) == expected["losses"][step] for step in left),
        "weights": _same(one["state_dict"], other["state_dict"]),
        "optimizer": _same(one["optimizer_states"], other["optimizer_states"]),
        "schedule": one["lr_schedulers"] == other["lr_schedulers"],
        "random states": _same(one["random_states"], other["random_states"]),
    }
    off = [abs(found["losses"].get(step, float("inf")) / expected["losses"][step] - 1) for step in left]
    return [name for name, same in equal.items() if not same], max(off, default=0.0)


def _same(one: Any, other: Any) -> bool:
    """Compare nested values, tensors by their bits."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def cell(run: Run, model: Path) -> str:
    """Return the table's cell of a continued run: `bits`, or `rows` and the largest relative difference of a loss.

    Args:
        run: The continued run.
        model: Folder that `equality_gradients.save_model` wrote.

    Raises:
        RuntimeError: If the run differs where it should not.
    """
    different, off = differences(run, model)
    if run.started_by == run.processes:
        if different:
            raise RuntimeError(f"{run}: different bits in {', '.join(different)}")
        return "bits"
    if {"steps", "rows", "schedule"} & set(different) or off > TOLERANCE:
        raise RuntimeError(f"{run}: {', '.join(different)} differ; the losses by up to {off:.1e}")
    return f"rows, {off:.0e}"


def uninterrupted(processes: int, modes: tuple[str, ...] = MODES) -> list[Run]:
    """Return the uninterrupted runs, which save checkpoints.

    Args:
        processes: Number of processes.
        modes: Some of `MODES`.
    """
    flags = (False, True)
    return [Run(mode, processes, drop, streams=streams) for mode in modes for drop in flags for streams in flags]


def continued(processes: int, started_by: int, modes: tuple[str, ...] = MODES) -> Iterator[Run]:
    """Yield a continued run for every moment.

    If the number of processes changes, there is no dropout, because its random numbers would change too.

    Args:
        processes: Number of processes that continue.
        started_by: Number of processes of the interrupted run.
        modes: Some of `MODES`.
    """
    for mode in modes:
        for moment in MOMENTS:
            yield Run(mode, processes, processes == started_by, moment, started_by, moment == "streaming")


def train_together(runs: list[Run], model: Path) -> None:
    """Train runs one after the other, in processes started for them if they have more than one.

    Args:
        runs: Runs with the same number of processes.
        model: Folder that `equality_gradients.save_model` wrote.
    """
    if runs[0].processes == 1:
        for run in runs:
            train(run, model)
        return
    run_in_processes(__file__, {"model": str(model), "runs": [asdict(run) for run in runs]}, runs[0].processes)


def table(model: Path) -> str:
    """Train everything, and return the comparison as a Markdown table."""
    topologies = [(1, 1), (2, 2), (2, 1), (1, 2)]
    for processes in (1, 2):
        train_together(uninterrupted(processes), model)
    cells: dict[tuple[str, str], list[str]] = {}
    for started_by, processes in topologies:
        runs = list(continued(processes, started_by))
        train_together(runs, model)
        for run in runs:
            cells.setdefault((run.mode, run.moment), []).append(cell(run, model))
    head = ["mode", "checkpoint", *(f"{started_by} → {processes}" for started_by, processes in topologies)]
    return markdown_table(head, [[*key, *row] for key, row in cells.items()])


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    given = json.loads(sys.argv[1])
    for options in given["runs"]:
        train(Run(**options), Path(given["model"]))
