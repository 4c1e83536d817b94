from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger

from sft_lightning.compat.lightning.loops import (
    align_progress,
    inner_optimizer,
    is_accumulating,
    reopen_epoch,
    set_device,
    set_logged_step,
    stop_asking_for_signals,
    validate_before_training,
)


class Line(LightningModule):
    """y = w · x, learned from batches of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.validated_at: list[int] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.weight * batch - 1).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.validated_at.append(self.trainer.global_step)
        self.log("val", batch.mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Loader:
    """Seven batches; notes the epochs that it is told."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    @property
    def sampler(self) -> Loader:
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Any:
        return iter(torch.ones(7, 1))


def run(folder: Path, *callbacks: Callback, loader: Any = None, **options: Any) -> tuple[Trainer, Line]:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **{**quiet, **options}, max_epochs=2
    )
    module = Line()
    trainer.fit(module, loader or Loader(), torch.utils.data.DataLoader(torch.ones(7, 1)))
    return trainer, module


@pytest.mark.filterwarnings("ignore")
def test_the_last_micro_batch_of_a_step_and_of_an_epoch_end_an_optimizer_step(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            seen.append(is_accumulating(trainer))

    trainer, _ = run(tmp_path, Watch(), accumulate_grad_batches=3)
    assert seen == 2 * [True, True, False, True, True, False, False]
    assert trainer.global_step == seen.count(False)


@pytest.mark.filterwarnings("ignore")
def test_lightning_tells_a_loader_its_epoch_through_its_sampler(tmp_path: Path) -> None:
    loader = Loader()
    run(tmp_path, loader=loader)
    assert loader.epochs == [0, 1]


@pytest.mark.filterwarnings("ignore")
def test_a_metric_is_logged_at_the_step_that_was_set(tmp_path: Path) -> None:
    class Moved(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                trainer.fit_loop.epoch_loop._batches_that_stepped = 100
                set_logged_step(trainer)

    trainer, _ = run(tmp_path, Moved(), logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1), log_every_n_steps=1)
    logged = [line.split(",") for line in Path(str(trainer.log_dir), "metrics.csv").read_text().splitlines()]
    column = logged[0].index("step")
    assert max(int(row[column]) for row in logged[1:]) < 100


@pytest.mark.filterwarnings("ignore")
def test_validation_runs_before_the_first_step_and_training_goes_on(tmp_path: Path) -> None:
    class First(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            validate_before_training(trainer)
            assert trainer.training

    trainer, module = run(tmp_path, First(), num_sanity_val_steps=0)
    assert module.validated_at == 7 * [0] + 7 * [7] + 7 * [14]
    assert trainer.global_step == 14
    assert "val" in trainer.callback_metrics


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoints_counters_are_set_to_the_start_of_a_step(tmp_path: Path) -> None:
    trainer, _ = run(tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fit_loop = torch.load(tmp_path / "last.ckpt", weights_only=True)["loops"]["fit_loop"]
    align_progress(fit_loop, 6)
    counted = fit_loop["epoch_loop.batch_progress"]
    assert set(counted["current"].values()) == {6}
    assert set(counted["total"].values()) == {13}
    reopen_epoch(fit_loop, 1)
    assert counted["is_last_batch"] is False
    assert fit_loop["epoch_progress"]["current"]["completed"] == 1
    assert fit_loop["epoch_progress"]["total"]["processed"] == 1


def test_counters_that_agree_stay_as_they_are() -> None:
    counters = {"ready": 4, "completed": 3, "started": 4, "processed": 4}
    fit_loop = {"epoch_loop.batch_progress": {"current": dict(counters), "total": dict(counters)}}
    align_progress(fit_loop, 4)
    assert fit_loop["epoch_loop.batch_progress"]["current"] == counters


def test_a_module_is_told_where_it_computes_and_its_parameters_stay() -> None:
    module = Line()
    set_device(module, torch.device("meta"))
    assert module.device.type == "meta"
    assert module.weight.device.type == "cpu"


def test_the_inner_optimizer_is_found_with_a_wrapper_and_without() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    assert inner_optimizer(LightningOptimizer(optimizer)) is optimizer
    assert inner_optimizer(optimizer) is optimizer


def test_the_training_loop_asks_no_process_for_signals(tmp_path: Path) -> None:
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    loop = trainer.fit_loop.epoch_loop
    asked = type(loop)._broadcast_sigterm_tensor
    stop_asking_for_signals(trainer)
    assert loop._broadcast_sigterm_tensor() is None  # the loop calls it by this name
    assert type(loop)._broadcast_sigterm_tensor is asked
    other = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    assert other.fit_loop.epoch_loop._broadcast_sigterm_tensor.__func__ is asked
