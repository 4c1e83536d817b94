"""`python -m sft_lightning`: finds the command without importing anything heavy, then hands over to it.

Every module of `sft_lightning.cli.commands` is a command; the first line of its docstring is its help. To add a
command, add a file.
"""

from __future__ import annotations

import ast
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from sft_lightning import __version__
from sft_lightning.errors import UserError, did_you_mean

_OF_SEVERAL_PROCESSES = ("fit", "validate", "test", "predict", "prepare")
"""Commands that a launcher may start several times over; of the others, each would do the whole work."""

USAGE = "usage: python -m sft_lightning COMMAND [options]"
HELP = """
options:
  -h, --help   show this help; COMMAND --help shows a command's options
  --version    show the version
  --debug      after COMMAND: show a traceback also for what you got wrong

Start with: python -m sft_lightning fit --config configs/qwen3_8b.yaml"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; default: the command line's.

    Returns:
        0 on success, 2 for what the user got wrong, 1 for our own failure.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    commands = find_commands()
    if not args or args[0] in ("-h", "--help"):
        print(_help(commands))
        return 0
    if args[0] == "--version":
        print(f"sft_lightning {__version__}")
        return 0
    name = args[0]
    if name not in commands:
        near = did_you_mean(name, commands)
        return _wrong(f"unknown command {name!r}.{near} Commands: {', '.join(commands)}.")
    rank, world_size = _place_among_processes()
    if world_size > 1 and name not in _OF_SEVERAL_PROCESSES:
        # The others leave in silence, and without an error for which a launcher would end the one that says it.
        return 0 if rank else _wrong(_one_process(name, world_size))
    return _run(name, args[1:])


def _place_among_processes() -> tuple[int, int]:
    """Return this process's number and how many a launcher started: torchrun and its like, or srun.

    `WORLD_SIZE` alone says nothing: clusters set it for a container in which nothing has been launched yet.
    """
    names = ("RANK", "WORLD_SIZE") if "LOCAL_RANK" in os.environ else ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    rank, world_size = (os.environ.get(name, "") for name in names)
    return int(rank or 0), int(world_size or 1)


def _one_process(name: str, world_size: int) -> str:
    return (
        f"{name}: runs in one process, and was launched in {world_size}, each of which would do the whole work; start "
        f"it without the launcher: python -m sft_lightning {name} ..."
    )


def find_commands() -> Mapping[str, str]:
    """Return each command's name and its one-line help, read from the files without importing them."""
    folder = Path(__file__).parent / "cli" / "commands"
    files = sorted(folder.glob("[!_]*.py"))
    return {file.stem: (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").split("\n")[0] for file in files}


def _run(name: str, args: list[str]) -> int:
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    # bitsandbytes says at every import that it could not fetch a kernel from a hub, which it need not.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        importlib.import_module(f"sft_lightning.cli.commands.{name}").main(args)
    except UserError as error:
        if debug:
            traceback.print_exc()
        return _wrong(str(error))
    return 0


def _help(commands: Mapping[str, str]) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {help_line}" for name, help_line in commands.items()]
    return "\n".join([USAGE, "", "Fine-tune causal language models, with proof.", "", "commands:", *lines, HELP])


def _wrong(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
