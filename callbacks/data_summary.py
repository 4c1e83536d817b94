"""What became of the data, as a table in the terminal and as `data_report.json`."""

from __future__ import annotations

import json

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.table import Table

from callbacks.run_folder import datamodule_of, run_folder
from callbacks.terminal import console
from sft_lightning.data.report import DataReport


class DataSummary(Callback):
    """Reports records, examples, tokens, supervised tokens and drops by reason of every source."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._report(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    @rank_zero_only
    def _report(self, trainer: Trainer) -> None:
        report = datamodule_of(trainer).report
        console().print(_table(report))
        if report.rows:
            print(
                f"{report.rows:,} rows of {report.max_length:,} tokens, {report.fill:.1%} full; "
                f"{report.optimizer_steps:,} optimizer steps per epoch"
            )
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "data_report.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n")


def _table(report: DataReport) -> Table:
    table = Table(title="data", title_justify="left")
    for heading in ("source", "format", "records", "examples", "tokens", "supervised", "longest", "dropped or cut"):
        table.add_column(heading, justify="left" if heading in ("source", "format", "dropped or cut") else "right")
    for name, source in report.sources.items():
        losses = [f"{count:,} {reason}" for reason, count in source.dropped.items()]
        if source.truncated:
            losses.append(f"{source.truncated:,} truncated")
        if source.supervised_tokens_lost:
            losses.append(f"{source.supervised_tokens_lost:,} supervised tokens lost")
        share = source.supervised_tokens / max(1, source.tokens)
        table.add_row(
            name,
            source.format,
            f"{source.records:,}",
            f"{source.examples:,}",
            f"{source.tokens:,}",
            f"{source.supervised_tokens:,} ({share:.0%})",
            f"{source.longest:,}",
            ", ".join(losses) or "–",
        )
    return table
