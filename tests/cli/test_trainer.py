from __future__ import annotations

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar

from callbacks import RunProgress, SampleGeneration, Throughput
from sft_lightning.cli.trainer import default_run_folder, with_default_callbacks


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
