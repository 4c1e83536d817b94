from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

from sft_lightning.compat.lightning.cli import CommandLine


class Model(LightningModule):
    """A model of one number."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.width = width


class Built(CommandLine):
    """Notes which trainer's method was called."""

    ran: str | None = None

    def _run_subcommand(self, subcommand: str) -> None:
        self.ran = subcommand


def build(command: str, *args: str) -> Built:
    quiet: dict[str, Any] = {"logger": False, "accelerator": "cpu"}
    return Built(
        command, list(args), model_class=Model, datamodule_class=LightningDataModule, save_config_callback=None,
        trainer_defaults=quiet,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_only_the_command_that_was_asked_for_has_a_parser() -> None:
    built = build("validate", "--model.width=2")
    assert built.ran == "validate"
    assert built.setting(built.config, "model")["width"] == 2
    [action] = [each for each in built.parser._actions if getattr(each, "_name_parser_map", None)]
    assert list(action._name_parser_map) == ["validate"]


@pytest.mark.filterwarnings("ignore")
def test_another_command_runs_nothing_and_has_the_same_settings() -> None:
    built = build("preview", "--model.width=3")
    assert built.ran is None
    assert not built.runs_trainer
    assert built.setting(built.config, "model")["width"] == 3
    assert isinstance(built.setting(built.config_init, "model"), Model)


@pytest.mark.filterwarnings("ignore")
def test_what_the_user_wrote_wins_over_a_checkpoints_hyper_parameters(tmp_path: Path) -> None:
    torch.save({"hyper_parameters": {"width": 7}}, tmp_path / "other.ckpt")
    built = build("validate", "--model.width=2", f"--ckpt_path={tmp_path / 'other.ckpt'}")
    assert built.setting(built.config_init, "model").width == 2


def test_lightning_still_asks_the_method_that_reads_checkpoints() -> None:
    assert "_parse_ckpt_path" in vars(LightningCLI)
