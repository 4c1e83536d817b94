from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from callbacks.run_outputs import run_folder


def trainer_with(logger: Any, root: Path) -> Trainer:
    return cast(Trainer, SimpleNamespace(logger=logger, default_root_dir=str(root)))


def test_outputs_go_to_the_loggers_folder(tmp_path: Path) -> None:
    assert run_folder(trainer_with(TensorBoardLogger(tmp_path, name="a", version="b"), tmp_path)) == tmp_path / "a/b"
    assert run_folder(trainer_with(CSVLogger(tmp_path, name="", version=""), Path("other"))) == tmp_path


def test_without_a_logger_outputs_go_to_the_trainers_root(tmp_path: Path) -> None:
    assert run_folder(trainer_with(None, tmp_path)) == tmp_path
    assert run_folder(trainer_with(SimpleNamespace(), tmp_path)) == tmp_path
