from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from callbacks.run_outputs import run_folder


@pytest.mark.parametrize(
    "logger", [None, TensorBoardLogger("elsewhere", name="a", version="b"), CSVLogger("elsewhere", name="", version="")]
)
def test_outputs_go_to_the_run_folder_whatever_the_logger(logger: Any, tmp_path: Path) -> None:
    assert run_folder(cast(Trainer, SimpleNamespace(logger=logger, default_root_dir=str(tmp_path)))) == tmp_path
