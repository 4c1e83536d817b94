"""LightningCLI with one subcommand, and with checkpoints that leave the configuration alone."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningCLI

from sft_lightning.compat.names import uses


class CommandLine(LightningCLI):
    """What our command line changes in Lightning's, beyond the methods that are documented to be overridden.

    Args:
        command: The trainer's method to run, or another name, which runs nothing.
        args: What follows the command on the command line.
        options: What else `LightningCLI` takes.
    """

    @uses(
        feature="starting fit, validate, test and predict quickly",
        since="2.0",
        replacement="the parsers of all four commands, which take three times as long to build",
    )
    def __init__(self, command: str, args: list[str], **options: Any) -> None:
        every = LightningCLI.subcommands()
        self.runs_trainer = command in every
        if self.runs_trainer:
            vars(self)["subcommands"] = lambda: {command: every[command]}
            args = [command, *args]
        super().__init__(args=args, run=self.runs_trainer, **options)

    @uses(
        feature="keeping what the user wrote over the hyper-parameters of a checkpoint",
        since="2.6",
        replacement="nothing: our checkpoints have no hyper-parameters, so only a file is read in vain",
    )
    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint."""

    def setting(self, config: Any, key: str) -> Any:
        """Return what a configuration has under a key, whether a subcommand is in between or not.

        Args:
            config: `self.config`, as parsed, or `self.config_init`, with everything built.
            key: Without the subcommand.
        """
        return config.get(str(self.subcommand), config).get(key)
