"""What became of the data, as tables in the terminal and as `data_report.json`."""

from __future__ import annotations

import json

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from callbacks.run_folder import datamodule_of, run_folder
from callbacks.terminal import console
from sft_lightning.data.report_table import report_tables


class DataSummary(Callback):
    """Reports records, examples, tokens, lengths, shares of the blend, and drops and repairs of every source."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if datamodule_of(trainer).streams:  # what they hold is known only now
            self._report(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._report(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    @rank_zero_only
    def _report(self, trainer: Trainer) -> None:
        report = datamodule_of(trainer).report
        out = console()
        for part in report_tables(report):
            out.print(part, markup=False, highlight=False)
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "data_report.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
