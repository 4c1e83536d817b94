"""Commands that read a run's configuration and have options of their own: their help, and how they parse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from sft_lightning.cli.arguments import asks_for_help
from sft_lightning.cli.parsing import command_parser

if TYPE_CHECKING:
    from sft_lightning.cli.app import SFTCommandLine

AddOptions = Callable[[ArgumentParser], None]


def parse_configuration(
    command: str, description: str | None, args: Sequence[str], add_options: AddOptions
) -> SFTCommandLine:
    """Return the configuration that a command line describes; print the command's help instead if that is asked for.

    Lightning, which takes seconds to import, is not imported for help.

    Args:
        command: The command's name.
        description: What it does.
        args: What follows it on the command line.
        add_options: Adds its options to a parser.

    Raises:
        SystemExit: With status 0, after the help.
        UserError: If there is no argument, a key is unknown, or a value is wrong.
    """
    if asks_for_help(args):
        _print_help(command, description, args, add_options)
        raise SystemExit(0)
    from sft_lightning.cli.app import SFTCommandLine
    from sft_lightning.cli.quiet import quiet_libraries

    quiet_libraries()
    return SFTCommandLine(command, list(args), add_options)


def _print_help(command: str, description: str | None, args: Sequence[str], add_options: AddOptions) -> None:
    parser = command_parser(command, description, args)
    parser.add_argument("-c", "--config", help="YAML file of a run. May be repeated: later files win.")
    parser.add_argument(
        "--KEY",
        metavar="VALUE",
        help="Any key of the configuration, such as --data.max_length 1024; "
        "python -m sft_lightning fit --help lists them.",
    )
    add_options(parser)
    parser.print_help()
