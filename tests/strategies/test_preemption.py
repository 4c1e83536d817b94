"""SIGTERM in one process: a checkpoint after the optimizer step, and exit status 143. More: `test_stopping.py`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from sft_lightning.strategies.preemption import Preemption, last_checkpoint


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
