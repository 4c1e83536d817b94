"""The `config.yaml` of a run, which continues it: written whole, and never over another one."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from sft_lightning.models.export.target import replaced_file


class SavedConfig(SaveConfigCallback):
    """Write the run's configuration to `config.yaml` in the run folder when training starts.

    Lightning's callback writes the file in place at every start: a kill at that moment would leave it empty.

    Args:
        args: The parser and the configuration, from LightningCLI.
        options: Passed on to Lightning's callback.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "save_to_log_dir": False})

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file; Lightning calls this on rank 0 only.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: The stage that begins, such as `fit`.
        """
        content: str = self.parser.dump(self.config, skip_unset=False)
        write_config(Path(trainer.default_root_dir) / self.config_filename, content)


def write_config(file: Path, content: str) -> None:
    """Write a configuration as a whole or not at all; keep an earlier one that differs beside it, numbered.

    Args:
        file: The file, such as `config.yaml`; an earlier one becomes `config.1.yaml`, the one after it `config.2.yaml`.
        content: YAML.
    """
    if file.is_file():
        if file.read_text(encoding="utf-8") == content:
            return
        numbered = (file.with_name(f"{file.stem}.{number}{file.suffix}") for number in count(1))
        os.link(file, next(path for path in numbered if not path.exists()))
    with replaced_file(file) as opened:
        opened.write(content.encode("utf-8"))
