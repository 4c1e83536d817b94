"""`python -m sft_lightning`: find the command without importing anything heavy, then run it.

A module of `sft_lightning.cli.commands` with a function `main(args)` is a command with the module's name, and the first
line of the module's docstring is its help. In a module without `main`, every public function is a command.
"""

from __future__ import annotations

import ast
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sft_lightning import __version__
from sft_lightning.checks import CheckError
from sft_lightning.errors import UserError, did_you_mean

_DISTRIBUTED = ("fit", "validate", "test", "predict", "prepare")
"""Commands that a launcher may start in several processes. All other commands run in one process and refuse a launcher,
because each process would do the whole work."""

_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Environment variables with the settings of torch's allocator, the present name first."""

USAGE = "usage: python -m sft_lightning COMMAND [options]"
HELP = """
options:
  -h, --help   show this help; COMMAND --help shows a command's options
  --version    show the version
  --debug      after COMMAND: show the traceback of a user error too

Start with: python -m sft_lightning fit --config configs/qwen3_8b.yaml"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; default: the command line's.

    Returns:
        0 on success, 2 for a user error, 1 for a failure of ours.
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
        return _error(f"unknown command {name!r}.{near} Commands: {', '.join(commands)}.")
    rank, world_size = _rank_and_world_size()
    if world_size > 1 and name not in _DISTRIBUTED:
        # Rank 0 reports it. The others succeed silently: if they failed first, the launcher would kill rank 0.
        return (
            0
            if rank
            else _error(
                f"{name}: runs in one process, but a launcher started {world_size} processes; run it "
                f"without the launcher: python -m sft_lightning {name} ..."
            )
        )
    return _run(commands[name], args[1:])


def _rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes that torchrun or srun started.

    `WORLD_SIZE` alone means nothing: clusters set it for a container in which no launcher has run yet.
    """
    names = ("RANK", "WORLD_SIZE") if "LOCAL_RANK" in os.environ else ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    rank, world_size = (os.environ.get(name, "") for name in names)
    return int(rank or 0), int(world_size or 1)


class Command(NamedTuple):
    """A command, and where it is defined."""

    module: str
    """Module within `sft_lightning.cli.commands`."""

    function: str
    """Name of the function that takes the arguments."""

    help: str
    """One line."""


def find_commands() -> Mapping[str, Command]:
    """Return all commands by name, read from the files without importing them."""
    files = sorted((Path(__file__).parent / "cli" / "commands").glob("[!_]*.py"))
    return dict(sorted(pair for file in files for pair in _commands_in(file)))


def _commands_in(file: Path) -> Iterator[tuple[str, Command]]:
    tree = ast.parse(file.read_text("utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if "main" in functions:
        yield file.stem, Command(file.stem, "main", _first_line(tree))
        return
    for name, node in functions.items():
        if not name.startswith("_"):
            yield name, Command(file.stem, name, _first_line(node))


def _first_line(node: ast.Module | ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").split("\n")[0]


def _run(command: Command, args: list[str]) -> int:
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    # At every import bitsandbytes warns that it could not download a kernel, which it does not need.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    _let_allocations_grow()
    try:
        getattr(importlib.import_module(f"sft_lightning.cli.commands.{command.module}"), command.function)(args)
    except (UserError, CheckError) as error:
        if debug:
            traceback.print_exc()
        return _error(str(error), status=2 if isinstance(error, UserError) else 1)
    return 0


def _let_allocations_grow() -> None:
    """Let torch's allocator extend its segments instead of fragmenting memory; what the user set stays.

    torch reads this when it first allocates on a GPU. Rows of different widths otherwise leave gaps that nothing fits.
    """
    if not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
        os.environ[_ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def _help(commands: Mapping[str, Command]) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in commands.items()]
    return "\n".join([USAGE, "", "Fine-tune causal language models.", "", "commands:", *lines, HELP])


def _error(message: str, status: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
