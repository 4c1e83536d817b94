from __future__ import annotations

from datetime import timedelta

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar

from callbacks import RunProgress, SampleGeneration, Throughput, TimedCheckpoint
from sft_lightning.cli.defaults import default_checkpoints, default_run_folder, with_default_callbacks


def test_every_epoch_and_every_half_hour_are_saved_by_default() -> None:
    by_epoch, by_time = default_checkpoints([Throughput()])
    assert isinstance(by_epoch, ModelCheckpoint)
    assert by_epoch.every_n_epochs == 1
    assert isinstance(by_time, TimedCheckpoint)
    assert by_time._train_time_interval == timedelta(minutes=30)


def test_another_interval_leaves_the_epochs_ends_and_another_cadence_leaves_nothing_of_ours() -> None:
    own: list[Callback] = [TimedCheckpoint(timedelta(hours=2))]
    [by_epoch] = default_checkpoints(own)
    assert not isinstance(by_epoch, TimedCheckpoint)
    assert default_checkpoints([ModelCheckpoint(every_n_train_steps=500)]) == []
    assert default_checkpoints([*own, ModelCheckpoint(every_n_train_steps=500)]) == []


@pytest.mark.parametrize("given", [None, SampleGeneration(prompts=[]), [SampleGeneration(prompts=[])]])
def test_a_default_callback_gives_way_to_the_users_own(given: Callback | list[Callback] | None) -> None:
    found = with_default_callbacks(given, progress_bar=True, checkpoints=True)
    [sampling] = [each for each in found if isinstance(each, SampleGeneration)]
    assert sampling.prompts == (None if given is None else [])
    assert any(isinstance(each, Throughput) for each in found)


def test_another_progress_bar_replaces_ours() -> None:
    found = with_default_callbacks([TQDMProgressBar()], progress_bar=True, checkpoints=False)
    assert not any(isinstance(each, RunProgress) for each in found)


def test_progress_and_checkpoints_can_be_turned_off() -> None:
    found = with_default_callbacks(None, progress_bar=False, checkpoints=False)
    assert not any(isinstance(each, RunProgress | ModelCheckpoint) for each in found)


def test_a_run_is_named_after_its_first_config_file() -> None:
    assert default_run_folder(["configs/mine.yaml", "other.yaml"]) == "runs/mine"
    assert default_run_folder(None) == default_run_folder([]) == "runs/sft"
