"""Whole weights at the end of training: there for what exports, gone again for what saves checkpoints."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn

from sft_lightning.strategies.sharded_strategy import ShardedStrategy


class Sharded(ShardedStrategy, SingleDeviceStrategy):
    """Has one process, and so whole weights; what stands in for them is still another parameter."""


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.language_model = torch.nn.Linear(2, 2, bias=False)


class Noting(Callback):
    def __init__(self) -> None:
        self.found: torch.Tensor | None = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found = cast("Model", pl_module).language_model.weight


class NotingCheckpoint(Noting, Checkpoint):
    """Saves at the end, as `ModelCheckpoint(save_last=True)` does in a run shorter than its interval."""


def end_of_training(callbacks: list[Callback], times: int = 1) -> tuple[Model, torch.Tensor]:
    """Call what the trainer calls when training ends; the model, and the weight that it was trained with."""
    strategy, model = Sharded(torch.device("cpu")), Model()
    options: Any = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}
    trainer = Trainer(strategy=strategy, accelerator="cpu", callbacks=callbacks, **options)
    strategy._lightning_module, trainer.state.fn = model, TrainerFn.FITTING
    weight = model.language_model.weight
    for _ in range(times):
        strategy.export_whole_at_end(trainer)
    for callback in cast("Any", trainer).callbacks:
        callback.on_train_end(trainer, model)
    return model, weight


def test_exports_find_whole_weights_and_a_checkpoint_of_the_end_the_shards() -> None:
    export, checkpoint = Noting(), NotingCheckpoint()
    model, shard = end_of_training([checkpoint, export])
    assert export.found is not shard
    assert torch.equal(cast("torch.Tensor", export.found), shard)
    assert checkpoint.found is shard
    assert model.language_model.weight is shard


def test_without_a_checkpoint_the_shards_are_back_all_the_same() -> None:
    export = Noting()
    model, shard = end_of_training([export], times=2)
    assert export.found is not shard
    assert model.language_model.weight is shard
