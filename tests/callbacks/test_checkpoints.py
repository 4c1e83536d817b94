from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import Throughput, TimedCheckpoint
from callbacks.checkpoints import default_checkpoints, set_folders


def test_each_epoch_and_every_half_hour_are_saved_by_default() -> None:
    by_epoch, by_time = default_checkpoints([Throughput()])
    assert isinstance(by_epoch, ModelCheckpoint)
    assert by_epoch.every_n_epochs == 1
    assert isinstance(by_time, TimedCheckpoint)
    assert by_time._train_time_interval == timedelta(minutes=30)


def test_an_own_interval_replaces_the_timed_one_and_an_own_checkpoint_replaces_both() -> None:
    own: list[Callback] = [TimedCheckpoint(timedelta(hours=2))]
    [by_epoch] = default_checkpoints(own)
    assert not isinstance(by_epoch, TimedCheckpoint)
    assert default_checkpoints([ModelCheckpoint(every_n_train_steps=500)]) == []
    assert default_checkpoints([*own, ModelCheckpoint(every_n_train_steps=500)]) == []


def test_every_callback_saves_in_the_run_folder_unless_it_has_its_own(tmp_path: Path) -> None:
    own, timed = ModelCheckpoint(dirpath=tmp_path / "own"), TimedCheckpoint()
    assert set_folders([Throughput(), own, timed], tmp_path / "run") == [tmp_path / "run", tmp_path / "own"]
    assert own.dirpath == str(tmp_path / "own")
    assert timed.dirpath == str(tmp_path / "run")


@pytest.mark.parametrize(("interval", "steps"), [("00:00:00", [1, 2, 3, 4, 5, 6, 7, 8]), ("01:00:00", [8])])
def test_the_clock_is_read_when_an_optimizer_step_has_ended(
    interval: str, steps: list[int], fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = ModelCheckpoint._save_checkpoint

    def note(self: ModelCheckpoint, trainer: object, filepath: str) -> None:
        save(self, trainer, filepath)  # type: ignore[arg-type]
        if Path(filepath).name == "last.ckpt":
            saved.append(torch.load(filepath, weights_only=True)["global_step"])

    monkeypatch.setattr(ModelCheckpoint, "_save_checkpoint", note)
    timed = f"{{class_path: callbacks.TimedCheckpoint, init_args: {{train_time_interval: {interval}}}}}"
    run = fit(
        f"--trainer.callbacks+={timed}",
        "--trainer.accumulate_grad_batches=3",
        "--data.packing=none",
    )
    assert sorted(set(saved)) == steps
    assert sorted(path.name for path in (run / "checkpoints").glob("*.ckpt")) == ["last.ckpt", "step=8.ckpt"]


@pytest.mark.parametrize(("world_size", "asked"), [(1, [1, 2, 3, 4, 5, 6]), (2, [3, 6])])
def test_several_processes_agree_on_the_clock_only_where_the_run_logs(
    world_size: int, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        ModelCheckpoint, "on_train_batch_end", lambda self, trainer, *rest: seen.append(trainer.global_step)
    )
    timed, ends = TimedCheckpoint(), SimpleNamespace(_should_accumulate=lambda: False)
    for step in range(1, 7):
        run: Any = SimpleNamespace(world_size=world_size, log_every_n_steps=3, global_step=step, fit_loop=ends)
        timed.on_train_batch_end(run, run, None, None, 0)
    assert seen == asked
