"""Runs in this process, runs that are killed, and what a run left in its folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.spec import TrainingSpec


class RunFolder:
    """A run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def scalars(self, tag: str) -> dict[int, float]:
        """A value of every optimizer step, from all event files of the run; later ones win."""
        found: dict[int, float] = {}
        for file in sorted(self.folder.glob("events*"), key=lambda path: path.stat().st_mtime):
            events = EventAccumulator(str(file)).Reload()
            if tag in events.Tags()["scalars"]:
                found |= {event.step: event.value for event in events.Scalars(tag)}
        return found

    @property
    def losses(self) -> dict[int, float]:
        return self.scalars("train/loss")

    def path(self, name: str = "last") -> Path:
        return self.folder / "checkpoints" / f"{name}.ckpt"

    def checkpoint(self, name: str = "last") -> dict[str, Any]:
        loaded: dict[str, Any] = torch.load(self.path(name), weights_only=True)
        return loaded

    def assert_ends_in_the_bits_of(self, other: RunFolder) -> None:
        """Step, weights, optimizer, schedule and random states of the last checkpoints are the same."""
        one, two = self.checkpoint(), other.checkpoint()
        assert one["global_step"] == two["global_step"]
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "random_states"):
            assert_same_bits(one[key], two[key], key)


def assert_same_bits(one: Any, other: Any, where: str) -> None:
    """Compare nested values, tensors by their bits."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_same_bits(value, other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, value in enumerate(one):
            assert_same_bits(value, other[index], f"{where}/{index}")
    else:
        assert one == other, where


@pytest.fixture
def make_run(
    model_dir: Path, alpaca_file: Path, tmp_path: Path
) -> Callable[..., tuple[Trainer, CausalLMModule, SFTDataModule]]:
    """Make a trainer, a module and its data, from `packing`, keys of the trainer (`trainer_…`) and of the model."""

    def build(**changes: Any) -> tuple[Trainer, CausalLMModule, SFTDataModule]:
        torch.manual_seed(0)
        data = SFTDataModule(
            DataSpec(
                sources={"toy": SourceConfig(path=str(alpaca_file))},
                template="alpaca",
                max_length=200,
                tokenizer_name_or_path=str(model_dir),
                packing=changes.pop("packing", "auto"),
                store_dir=str(tmp_path / "stores"),
            )
        )
        options: dict[str, Any] = {"model_name_or_path": str(model_dir), "dtype": "float32"}
        module = CausalLMModule(
            TrainingSpec(
                optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-2),
                **{**options, **{key: changes.pop(key) for key in list(changes) if not key.startswith("trainer_")}},
            )
        )
        trainer = Trainer(
            **{
                "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
                "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path,
                **{key.removeprefix("trainer_"): value for key, value in changes.items()},
            }
        )  # fmt: skip
        return trainer, module, data

    return build


class Waits(TorchDispatchMode):
    """Notes the operations for which a GPU would be waited for, or which make tensors from Python numbers."""

    NAMES = ("_local_scalar_dense", "nonzero", "lift_fresh", "_unique2", "unique_dim", "masked_select", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return a list that gets, for each micro-batch from its forward pass to its end, what would wait for a GPU."""
    found: list[list[str]] = []
    counter = Waits()
    step, end = CausalLMModule.training_step, CausalLMModule.on_train_batch_end

    def begin(self: CausalLMModule, *args: Any) -> torch.Tensor:
        counter.__enter__()
        return step(self, *args)

    def stop(self: CausalLMModule, *args: Any) -> None:
        end(self, *args)
        counter.__exit__(None, None, None)
        found.append(counter.seen)
        counter.seen = []

    monkeypatch.setattr(CausalLMModule, "training_step", begin)
    monkeypatch.setattr(CausalLMModule, "on_train_batch_end", stop)
    return found


@pytest.fixture(scope="session")
def read_run() -> Callable[[Path], RunFolder]:
    """Read what a run left in its folder."""
    return RunFolder


KILLER = """
import os, signal
from lightning.pytorch import Callback

class KillAt(Callback):
    def __init__(self, micro_batch: int) -> None:
        self.left = micro_batch

    def on_train_batch_end(self, *args) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def fit_and_kill(tmp_path: Path) -> Callable[[list[str], int], None]:
    """Run `fit` in a process of its own, which ends by SIGKILL after so many micro-batches, however fast it is."""

    def run(options: list[str], micro_batch: int) -> None:
        (tmp_path / "killer.py").write_text(KILLER)
        killer = f"--trainer.callbacks+={{class_path: killer.KillAt, init_args: {{micro_batch: {micro_batch}}}}}"
        done = subprocess.run(
            [sys.executable, "-m", "sft_lightning", "fit", *options, killer],
            capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]

    return run
