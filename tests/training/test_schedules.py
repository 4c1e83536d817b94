"""Covers callbacks.checkpoints, callbacks.evaluations and sft_lightning.compat.lightning.schedules.

A run saves and validates at the optimizer steps at which transformers' Trainer does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers.trainer_callback import DefaultFlowCallback, TrainerControl

from callbacks import EvaluateEvery, LastCheckpoint
from callbacks.checkpoints import default_checkpoints


class Line(LightningModule):
    """y = w · x; notes the steps after which it was validated."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.validated: list[int] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.weight * batch - 1).square().mean()

    def on_validation_start(self) -> None:
        self.validated.append(self.trainer.global_step)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/loss", batch.mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Loader:
    """An epoch of seven micro-batches, with a position that is saved."""

    def __init__(self) -> None:
        self.next = 0

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Any:
        self.next %= 7
        while self.next < 7:
            self.next += 1
            yield torch.tensor([float(self.next)])

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


@dataclass
class Schedule:
    """Intervals in transformers' words: a number of steps, `epoch` or `no`."""

    save: int | str
    evaluate: int | str
    accumulate: int = 1
    max_steps: int = -1
    epochs: int = 2


TABLE = [
    # schedule                                            saved                    validated
    (Schedule("epoch", "epoch"), [7, 14], [7, 14]),
    (Schedule("epoch", "epoch", accumulate=3), [3, 6], [3, 6]),
    (Schedule("epoch", "epoch", max_steps=9), [7, 9], [7, 9]),
    (Schedule("epoch", 4), [7, 14], [4, 8, 12, 14]),
    (Schedule("epoch", 2, accumulate=3), [3, 6], [2, 4, 6]),
    (Schedule(2, "epoch"), [2, 4, 6, 8, 10, 12, 14], [7, 14]),
    (Schedule(2, 5, epochs=-1, max_steps=12), [2, 4, 6, 8, 10, 12], [5, 10, 12]),
    (Schedule(5, 2, accumulate=3, epochs=3), [5, 9], [2, 4, 6, 8, 9]),
    (Schedule(3, 3), [3, 6, 9, 12, 14], [3, 6, 9, 12, 14]),
    (Schedule(100, 100), [14], [14]),
    (Schedule(4, "no"), [4, 8, 12, 14], [14]),
]
"""Optimizer steps of runs of seven micro-batches an epoch; where transformers never validates, ours does at the end."""


def steps_of_transformers(schedule: Schedule) -> tuple[list[int], list[int]]:
    """What transformers' own callback decides."""
    per_epoch = -(-7 // schedule.accumulate)
    last = schedule.max_steps if schedule.max_steps > 0 else per_epoch * schedule.epochs

    def strategy(value: int | str) -> str:
        return "steps" if isinstance(value, int) else value

    args: Any = SimpleNamespace(
        logging_first_step=False, logging_strategy="no", eval_delay=0,
        eval_strategy=strategy(schedule.evaluate), save_strategy=strategy(schedule.save),
    )  # fmt: skip
    saved, evaluated = set(), set()
    for step in range(1, last + 1):
        state: Any = SimpleNamespace(
            global_step=step, max_steps=last, epoch=step / per_epoch, logging_steps=1,
            eval_steps=schedule.evaluate, save_steps=schedule.save,
        )  # fmt: skip
        control = TrainerControl()
        DefaultFlowCallback().on_step_end(args, state, control)
        if step % per_epoch == 0 or step == last:
            DefaultFlowCallback().on_epoch_end(args, state, control)
        saved |= {step} if control.should_save else set()
        evaluated |= {step} if control.should_evaluate else set()
    return sorted(saved), sorted(evaluated)


def train(
    schedule: Schedule, folder: Path, checkpoints: list[ModelCheckpoint], ckpt_path: str | None = None
) -> list[int]:
    """Return the steps after which a run was validated; `checkpoints` save in `folder`."""
    for callback in checkpoints:
        callback.dirpath = str(folder)
    evaluate = schedule.evaluate
    if isinstance(evaluate, int):
        evaluations = EvaluateEvery(every_n_steps=evaluate)
    else:
        evaluations = EvaluateEvery(every_n_epochs=1) if evaluate == "epoch" else EvaluateEvery()
    trainer = Trainer(
        max_epochs=schedule.epochs, max_steps=schedule.max_steps, accumulate_grad_batches=schedule.accumulate,
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        default_root_dir=folder, callbacks=[LastCheckpoint(), evaluations, *checkpoints],
    )  # fmt: skip
    model = Line()
    trainer.fit(model, Loader(), [torch.ones(1)], ckpt_path=ckpt_path)
    return model.validated


@pytest.fixture(autouse=True)
def any_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("callbacks.evaluations.require_validation", lambda trainer, callback: None)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(found[1]) for path in folder.glob("*.ckpt") if (found := re.fullmatch(r"step=(\d+)", path.stem)))


@pytest.mark.parametrize(("schedule", "saved", "validated"), TABLE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_saves_and_validates_when_transformers_does(
    schedule: Schedule, saved: list[int], validated: list[int], tmp_path: Path
) -> None:
    expected = steps_of_transformers(schedule)
    assert saved == expected[0]
    assert validated == (expected[1] or [saved[-1]])
    every = {"every_n_train_steps": schedule.save} if isinstance(schedule.save, int) else {"every_n_epochs": 1}
    newest = ModelCheckpoint(filename="{step}", save_top_k=-1, save_last=True, **every)  # type: ignore[arg-type]
    assert train(schedule, tmp_path, [newest]) == validated
    assert steps_in(tmp_path) == saved
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == saved[-1]


@pytest.mark.parametrize("evaluate", ["epoch", 5])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_newest_checkpoints_are_kept_whatever_validation_does(evaluate: int | str, tmp_path: Path) -> None:
    newest = ModelCheckpoint(
        filename="{step}", every_n_train_steps=2, save_top_k=3, monitor="step", mode="max", save_last=True
    )
    train(Schedule(2, evaluate, epochs=-1, max_steps=11), tmp_path, [newest])
    assert steps_in(tmp_path) == [8, 10, 11]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_default_checkpoints_and_those_of_a_metric_end_with_the_last_step(tmp_path: Path) -> None:
    defaults: Any = default_checkpoints([])
    train(Schedule("epoch", 4), tmp_path / "default", defaults)
    assert steps_in(tmp_path / "default") == [14]
    best = ModelCheckpoint(filename="best", monitor="val/loss", save_last=True, every_n_train_steps=5)
    train(Schedule(5, "epoch"), tmp_path / "best", [best])
    assert torch.load(tmp_path / "best" / "last.ckpt")["global_step"] == 14


@pytest.mark.parametrize("stop", [4, 6])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_continued_run_keeps_the_schedule(stop: int, tmp_path: Path) -> None:
    schedule = Schedule(2, 3, accumulate=3, epochs=4)

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)

    whole = train(schedule, tmp_path / "whole", [saver()])
    again = train(schedule, tmp_path / "again", [saver()], str(tmp_path / "whole" / f"step={stop}.ckpt"))
    assert again == [step for step in whole if step > stop]
    assert sorted(path.name for path in (tmp_path / "again").glob("*.ckpt")) == sorted(
        ["last.ckpt", *(f"step={step}.ckpt" for step in range(stop + 2, 13, 2))]
    )
