"""The configuration of a run, in its logs."""

from __future__ import annotations

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from callbacks.run_folder import run_folder
from callbacks.text_logging import fenced, log_text


class HyperParameters(Callback):
    """Gives the run's `config.yaml` to the loggers: as text (`run/config`), and as values where they keep them.

    A trainer without the command line has no such file, and logs none.
    """

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        file = run_folder(trainer) / "config.yaml"
        if not file.is_file():
            return
        text = file.read_text(encoding="utf-8")
        log_text(trainer, "run/config", fenced(text, "yaml"))
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):  # which would draw a point of no metric for them
                logger.log_hyperparams(yaml.safe_load(text))
