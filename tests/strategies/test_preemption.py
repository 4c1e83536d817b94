"""SIGTERM in one process: a checkpoint after the optimizer step, and exit status 143. More: `test_stopping.py`."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from sft_lightning.strategies.preemption import Preemption, SignalVote, last_checkpoint, steps_between_votes

CPU = torch.device("cpu")


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch).sum()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Signal(Callback):
    """Sends SIGTERM to this process at a micro-batch."""

    def __init__(self, at: int) -> None:
        self._at = at

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self._at:
            os.kill(os.getpid(), signal.SIGTERM)


def trainer(folder: Path, *callbacks: Callback) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize(("signalled_at", "saved_step"), [(0, 1), (3, 2)])
def test_sigterm_finishes_the_optimizer_step_saves_it_and_exits_with_143(
    tmp_path: Path, signalled_at: int, saved_step: int
) -> None:
    run = trainer(tmp_path, Preemption(), Signal(signalled_at))
    with pytest.raises(SystemExit) as exit_:
        run.fit(Module(), DataLoader(torch.ones(8, 2), batch_size=1))
    assert exit_.value.code == 143
    assert torch.load(tmp_path / "checkpoints/last.ckpt")["global_step"] == saved_step


def test_a_run_without_a_signal_ends_as_always(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run = trainer(tmp_path, Preemption())
    run.fit(Module(), DataLoader(torch.ones(4, 2), batch_size=1))
    assert run.global_step == 2
    assert not (tmp_path / "checkpoints/last.ckpt").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_last_checkpoint_is_beside_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    assert last_checkpoint(trainer(tmp_path, ModelCheckpoint(dirpath=folder))) == folder / "last.ckpt"
    assert last_checkpoint(trainer(tmp_path)) == tmp_path / "checkpoints/last.ckpt"


@pytest.mark.parametrize(
    ("seconds", "steps"), [(0.0, 1), (30.0, 1), (1.0, 1), (0.3, 3), (0.1, 10), (0.001, 50)], ids=str
)
def test_processes_compare_their_signals_about_once_a_second_and_once_in_a_logging_interval(
    seconds: float, steps: int
) -> None:
    assert steps_between_votes(seconds, max_steps=50) == steps


def test_a_process_alone_compares_with_nobody() -> None:
    vote = SignalVote(1, max_steps=50, device=CPU)
    assert not vote.any_signalled(False, 1)
    assert vote.any_signalled(True, 2)


def test_processes_compare_at_the_same_steps_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanged: list[list[float]] = []
    seconds = 0.25  # of the slower process

    def all_reduce(flags: torch.Tensor, op: Any, group: Any) -> None:
        exchanged.append(flags.tolist())
        flags[1] = seconds if len(exchanged) > 1 else 0.0
        flags[0] = 1.0 if len(exchanged) == 4 else flags[0]

    monkeypatch.setattr(torch.distributed, "new_group", lambda backend: backend)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    vote = SignalVote(2, max_steps=3, device=CPU)
    answers = {step: vote.any_signalled(False, step) for step in range(1, 12)}
    assert len(exchanged) == 5
    assert {step for step, answer in answers.items() if answer} == {8}  # of 1, 2, 5, 8 and 11


def test_processes_without_gloo_compare_by_their_devices_once_in_a_logging_interval(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_gloo(backend: str) -> None:
        raise RuntimeError("Unable to resolve hostname\nmore")

    compared: list[torch.device] = []

    def all_reduce(flags: torch.Tensor, op: Any, group: Any) -> None:
        assert group is None
        compared.append(flags.device)

    monkeypatch.setattr(torch.distributed, "new_group", no_gloo)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: [0.0, 0.5])  # the device has no numbers
    with caplog.at_level(logging.INFO):
        vote = SignalVote(2, max_steps=4, device=torch.device("meta"))
    asked = []
    for step in range(1, 10):
        vote.any_signalled(False, step)
        asked.append(len(compared))
    assert asked == [1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert {device.type for device in compared} == {"meta"}
    assert "SIGTERM: noticed every 4 optimizer steps, because gloo failed (Unable to resolve hostname)" in caplog.text
