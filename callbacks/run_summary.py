"""The configuration, the data and the checks of a run, shown in the terminal and given to the loggers."""

from __future__ import annotations

import json
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.text import Text

from callbacks.run_outputs import log_text, run_folder
from sft_lightning.checks import Check
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.terminal import fenced, make_console
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.startup import datamodule_of
from sft_lightning.views.check_table import check_markdown, check_table
from sft_lightning.views.highlight import ShownToken, show_tokens
from sft_lightning.views.marked_text import FRAME, around_the_first_answer, marked_text
from sft_lightning.views.report_table import report_tables

_TOKENS_IN_THE_TERMINAL = 256
"""Most tokens of the first example to print; the loggers get the full example."""


class HyperParameters(Callback):
    """Log the run's `config.yaml` as text (`run/config`), and as hyper-parameters to loggers that store them.

    Does nothing without that file, which the command line writes.
    """

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        file = run_folder(trainer) / "config.yaml"
        if not file.is_file():
            return
        text = file.read_text(encoding="utf-8")
        log_text(trainer, "run/config", fenced(text, "yaml"))
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):  # it would plot them as a metric without values
                logger.log_hyperparams(yaml.safe_load(text))


class DataSummary(Callback):
    """Report records, examples, tokens, lengths, blend shares, drops and repairs of every source.

    The report is printed, written to `data_report.json` and logged as `run/data_report`. The first training example is
    printed and logged as `run/example`, decoded, with its supervised tokens marked; streamed data has none before
    training.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)
        self._show_example(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if datamodule_of(trainer).spec.streams:  # the counts are known only now
            self._report(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._report(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    @rank_zero_only
    def _report(self, trainer: Trainer) -> None:
        report = datamodule_of(trainer).report
        out = make_console()
        for part in report_tables(report):
            out.print(part, markup=False, highlight=False)
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report.as_dict(), indent=2)
        (folder / "data_report.json").write_text(f"{text}\n", encoding="utf-8")
        if trainer.state.fn == "fit":
            log_text(trainer, "run/data_report", fenced(text, "json"))

    @rank_zero_only
    def _show_example(self, trainer: Trainer) -> None:
        tokens = _first_example(datamodule_of(trainer))
        if not tokens:
            return
        num_supervised = sum(token.weight > 0 for token in tokens)
        counts = f"{len(tokens):,} tokens, {num_supervised:,} supervised"
        out = make_console()
        shown = around_the_first_answer(tokens, _TOKENS_IN_THE_TERMINAL)
        part = f"; tokens {shown[0].position:,} to {shown[-1].position:,}" if len(shown) < len(tokens) else ""
        marked = "green" if out.is_terminal else "between " + " and ".join(FRAME)
        out.print(Text(f"first example: {counts}{part}; supervised text is {marked}", "bold"), soft_wrap=True)
        out.print(marked_text(shown, colours=out.is_terminal), soft_wrap=True)
        log_text(trainer, "run/example", f"{counts}\n\n{fenced(marked_text(tokens, colours=False).plain)}")


def _first_example(data: SFTDataModule) -> list[ShownToken]:
    """Return the tokens of the first training example; none for streamed data."""
    if data.spec.streams:
        return []
    first = data.plan(0).row(0)[0].tolist()
    return show_tokens(data.blend.examples.example(*first), data.tokenizer)


class CheckSummary(Callback):
    """Print what the run has checked: a table after the first optimizer step, and one at the end of what came later.

    All checks are logged as `run/checks`, and written into the `run_manifest.json` of the exports.
    """

    def __init__(self) -> None:
        self._shown: list[Check] = []
        self._first_step: int | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._first_step is None:
            self._first_step = trainer.global_step
        elif not self._shown and trainer.global_step > self._first_step:
            self._show(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, pl_module)

    @rank_zero_only
    def _show(self, trainer: Trainer, module: LightningModule) -> None:
        if not isinstance(module, CausalLMModule):
            return
        checks = module.checks.checks
        new = [check for check in checks if check not in self._shown]
        if new:
            make_console().print(check_table(checks, new), markup=False, highlight=False)
            log_text(trainer, "run/checks", check_markdown(checks))
        self._shown = checks
