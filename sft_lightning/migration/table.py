"""docs/migrating.md, made from the same entries that translate."""

from __future__ import annotations

from collections.abc import Iterable

from sft_lightning.migration.options import Option, System
from sft_lightning.migration.training_arguments import TRAINING_ARGUMENTS

_INTRODUCTION = """\
# Migrating

```bash
python -m sft_lightning migrate SYSTEM train.sh > mine.yaml      # a shell script
python -m sft_lightning migrate SYSTEM args.json > mine.yaml     # a JSON file of options
python -m sft_lightning migrate SYSTEM deepspeed train_lora.py --lora_r 8 …   # or the command itself
python -m sft_lightning fit --config mine.yaml
```

SYSTEM is {names}.

Nothing is executed: variables that the script sets are put in. What could not be carried over stands at the end of the
YAML as comments, each with the reason. Defaults of that system are written out where ours are others.

A step's loss is divided by all supervised tokens of the step, so that every token weighs the same, and masks are exact.
`data.packing: none` in the result keeps the number of examples per optimizer step; `best_fit` is faster.

This file is what `python -m sft_lightning migrate --table` prints.
"""


def document(systems: Iterable[System]) -> str:
    """Return the document, as Markdown."""
    systems = list(systems)
    parts = [_INTRODUCTION.format(names=", ".join(f"`{system.name}`" for system in systems))]
    shared = {option.name for option in TRAINING_ARGUMENTS}
    for system in systems:
        own = [option for option in system.options if option not in TRAINING_ARGUMENTS]
        parts.append(f"## {system.title}: `{system.name}`\n\n{system.source}\n\n{_table(own)}")
        if shared <= {option.name for option in system.options}:
            parts[-1] += "\nAnd the training arguments below.\n"
    parts.append(f"## transformers' `TrainingArguments`\n\n{_table(TRAINING_ARGUMENTS)}")
    return "\n".join(parts)


def _table(options: Iterable[Option]) -> str:
    rows = ["| option | key | |", "| --- | --- | --- |"]
    for option in options:
        keys = ", ".join(f"`{key.strip()}`" for key in option.key.split(",") if key.strip())
        default = f"default {option.default}" if option.default is not None else ""
        note = "; ".join(filter(None, (option.note, default))).replace("|", "\\|")
        rows.append(f"| `--{option.name}` | {keys or '–'} | {note} |")
    return "\n".join(rows) + "\n"
