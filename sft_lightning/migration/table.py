"""Write docs/migrating.md from the options that the translation uses."""

from __future__ import annotations

from collections.abc import Iterable

from sft_lightning.migration.options import Option, System
from sft_lightning.migration.training_arguments import TRAINING_ARGUMENTS

_INTRODUCTION = """\
# Migrating

```bash
python -m sft_lightning migrate SYSTEM train.sh > mine.yaml      # a shell script; its own arguments may follow
python -m sft_lightning migrate SYSTEM args.json > mine.yaml     # a JSON file of options
python -m sft_lightning migrate SYSTEM deepspeed train_lora.py --lora_r 8 … > mine.yaml   # the command itself
python -m sft_lightning fit --config mine.yaml
```

SYSTEM is {names}.

Nothing is executed: `migrate` reads the script and expands the variables that it sets. Options that are not migrated
follow the YAML as comments, each with the reason. Where a default of the system differs from ours, it is written out.
A DeepSpeed JSON that exists is used as it is (`DeepSpeedZeRO` with `config:`); its scheduler overrides the command's,
as under the Hugging Face Trainer. DeepSpeed-Chat's `run_prompt.sh` becomes a `compare` command.

The loss differs from these systems in two ways: the loss of an optimizer step is divided by the number of its
supervised tokens, so that every token has the same weight, and masks are exact. `data.packing: none` in the result
keeps the number of examples per optimizer step; `best_fit` is faster.

This page is the output of `python -m sft_lightning migrate --table`.
"""


def document(systems: Iterable[System]) -> str:
    """Return docs/migrating.md, with one table per system."""
    systems = list(systems)
    parts = [_INTRODUCTION.format(names=", ".join(f"`{system.name}`" for system in systems))]
    shared = {option.name for option in TRAINING_ARGUMENTS}
    for system in systems:
        takes_all = shared <= {option.name for option in system.options}
        own = [option for option in system.options if not (takes_all and option in TRAINING_ARGUMENTS)]
        parts.append(f"## {system.title}: `{system.name}`\n\n{system.source}\n\n{_table(own)}")
        if takes_all:
            parts[-1] += "\nIt also takes the training arguments below.\n"
    parts.append(f"## transformers' `TrainingArguments`\n\n{_table(TRAINING_ARGUMENTS)}")
    return "\n".join(parts)


def _table(options: Iterable[Option]) -> str:
    rows = ["| option | key | note |", "| --- | --- | --- |"]
    for option in options:
        keys = ", ".join(f"`{key.strip()}`" for key in option.key.split(",") if key.strip())
        default = f"default {option.default}" if option.default is not None else ""
        prefix = "not migrated: " if option.how == "omitted" else ""
        note = "; ".join(filter(None, (f"{prefix}{option.note}", default))).replace("|", "\\|")
        rows.append(f"| `--{option.name}` | {keys or '–'} | {note} |")
    return "\n".join(rows) + "\n"
