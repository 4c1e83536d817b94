"""LightningCLI with one subcommand, and with checkpoints that leave the configuration alone."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningCLI

from sft_lightning.compat.names import uses


class CommandLine(LightningCLI):
    """LightningCLI that builds the parser of one subcommand only, and takes no configuration from checkpoints.

    Args:
        command: The trainer's method to run, or another name, which runs nothing.
        args: What follows the command on the command line.
        options: What else `LightningCLI` takes.
    """

    @uses(
        feature="fast start of fit, validate, test and predict",
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
        feature="fit --ckpt_path with the configuration that the user wrote",
        since="2.6",
        replacement="not needed: our checkpoints have no hyper-parameters; Lightning would read the file for nothing",
    )
    def _parse_ckpt_path(self) -> None:
        """Take no configuration from a checkpoint."""

    def setting(self, config: Any, key: str) -> Any:
        """Return what a configuration has under a key, whether a subcommand is in between or not.

        Args:
            config: `self.config`, as parsed, or `self.config_init`, with everything built.
            key: Without the subcommand.
        """
        return config.get(str(self.subcommand), config).get(key)
