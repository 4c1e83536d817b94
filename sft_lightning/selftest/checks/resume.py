"""Check that a run which is interrupted and continued ends with the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from sft_lightning.checks import Check, CheckError
from sft_lightning.data.plan.epoch_plan import Packing
from sft_lightning.selftest.short_runs import Run, Runner
from sft_lightning.selftest.small_data import SmallData
from sft_lightning.training.checkpoint.state import trainable_state

_STEPS = 4
"""Optimizer steps of a run; its checkpoint is saved halfway."""

_ACCUMULATE = 2
"""Micro-batches per optimizer step."""


def check_resume(runner: Runner, small: SmallData, packing: Packing, folder: Path) -> tuple[Check, Run | None]:
    """Train a few steps, continue from the checkpoint halfway, and compare weights and optimizer states bit by bit.

    Args:
        runner: Runs the configuration.
        small: The examples; the run repeats them if they are few.
        packing: `data.packing` of the configuration.
        folder: Folder for the checkpoints.

    Returns:
        The check, and the continued run; `None` if that run's own checks stopped it.
    """
    uninterrupted = _train(runner, small, packing, folder)
    expected, steps = digests(uninterrupted), int(uninterrupted.trainer.global_step)
    del uninterrupted
    checkpoint = folder / f"step={_STEPS // 2}.ckpt"
    middle = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    before = {f"weight {name}": _digest(tensor) for name, tensor in middle.items()}
    try:
        continued = _train(runner, small, packing, None, ckpt_path=checkpoint)
    except CheckError as error:
        return Check("resume", False, str(error)), None
    return compare(expected, digests(continued), before, steps), continued


def compare(expected: Mapping[str, str], found: Mapping[str, str], before: Mapping[str, str], steps: int) -> Check:
    """Compare the digests of two finished runs.

    Args:
        expected: Digests of the uninterrupted run.
        found: Digests of the continued run.
        before: Digests of the weights at the checkpoint. Some must have changed since, or the check shows nothing.
        steps: Optimizer steps of the uninterrupted run.
    """
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    changed = sum(found.get(name) != digest for name, digest in before.items())
    what = f"{steps} steps against {_STEPS // 2} + {steps - _STEPS // 2} from a checkpoint"
    if different:
        figure = f"{what}: {len(different)} of {len(expected)} tensors differ, such as {different[0]}"
        return Check("resume", False, figure)
    if not changed:
        return Check("resume", False, f"{what}: no weight changed; is the lr of model.optimizer above 0?")
    return Check(
        "resume",
        True,
        f"{what}: all {len(expected)} tensors have the same bits; {changed} changed after the checkpoint",
    )


def _train(
    runner: Runner, small: SmallData, packing: Packing, folder: Path | None, ckpt_path: Path | None = None
) -> Run:
    keys: dict[str, Any] = {}
    if folder is not None:
        options = {"dirpath": str(folder), "filename": "{step}", "every_n_train_steps": _STEPS // 2, "save_top_k": -1}
        checkpoints = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": options}
        keys = {"callbacks": [checkpoints], "enable_checkpointing": True}
    data = small.module(batch_size=1, packing=packing)
    return runner.fit(data, max_steps=_STEPS, accumulate=_ACCUMULATE, trainer=keys, ckpt_path=ckpt_path)


def digests(run: Run) -> dict[str, str]:
    """Return a hash of each trained weight and of each tensor in the optimizer's state."""
    found = {f"weight {name}": _digest(t) for name, t in trainable_state(run.module, run.module.state_dict()).items()}
    for number, state in run.trainer.optimizers[0].state_dict()["state"].items():
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        found |= {f"optimizer {number} {key}": _digest(tensor) for key, tensor in tensors.items()}
    return found


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tuple(tensor.shape)} {tensor.dtype} {xxhash.xxh3_128(data.data).hexdigest()}"
