"""Translate a command line, shell script or JSON file of another fine-tuning system into YAML."""

from __future__ import annotations

from collections.abc import Sequence

from sft_lightning.errors import UserError, one_of
from sft_lightning.migration.arguments import read_options
from sft_lightning.migration.options import translate
from sft_lightning.migration.prompt_eval import PROGRAM, compare_command
from sft_lightning.migration.systems import SYSTEMS
from sft_lightning.migration.table import document

_USAGE = f"""\
usage: python -m sft_lightning migrate SYSTEM SCRIPT.sh [ITS ARGUMENTS] | ARGS.json | COMMAND ...
       python -m sft_lightning migrate --table

{__doc__}
Nothing is executed. Options that cannot be migrated follow the YAML as comments, each with the reason.

  SYSTEM   {", ".join(SYSTEMS)}
  --table  print the options of all systems and our keys for them as Markdown"""


def main(args: Sequence[str]) -> None:
    """Print the YAML for the options of a system; all words after its name belong to the system."""
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE)
    elif args[0] == "--table":
        print(document(SYSTEMS.values()), end="")
    elif args[0] not in SYSTEMS:
        raise one_of("migrate: the system", args[0], SYSTEMS)
    else:
        print(migrate(args[0], args[1:]), end="")


def migrate(system: str, args: Sequence[str]) -> str:
    """Return the YAML for the options of a system; for DeepSpeed-Chat's `prompt_eval.py`, a `compare` command.

    Args:
        system: A key of `SYSTEMS`.
        args: A file, or the words of a command.

    Raises:
        UserError: If there are no options to read, or if a value is not what its option takes.
    """
    chosen = SYSTEMS[system]
    given = read_options([*args])
    if not given.options:
        raise UserError(f"migrate {system}: found no options; give the script or the command that trains")
    if system == "deepspeed_chat" and given.program.endswith(PROGRAM):
        return compare_command(given)
    draft = translate(chosen, given)
    program = f", {given.program}" if given.program else ""
    return draft.text(
        f"Migrated from {chosen.title}{program}. Check it with: python -m sft_lightning preview --config <this file>"
    )
