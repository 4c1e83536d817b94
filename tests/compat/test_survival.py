"""Covers sft_lightning.compat and every module that a command imports: a name that is gone breaks no other command."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT = """
import importlib, pkgutil, sys
import lightning.pytorch.cli, peft, transformers.modeling_utils  # libraries use their own names while they are imported
import sft_lightning.compat
from sft_lightning.compat.names import ENTRIES

for found in pkgutil.walk_packages(sft_lightning.compat.__path__, "sft_lightning.compat."):
    importlib.import_module(found.name)
deleted = 0
for name in sorted({name for entry in ENTRIES for name in entry.names}):
    module, _, path = name.partition(":")
    *owners, last = path.split(".")
    if module.startswith("deepspeed") or (module.count(".") < 2 and not last.startswith("_")):
        continue  # an extra, which nothing imports here; a documented class, which other modules do
    try:
        owner = importlib.import_module(module)
        for each in owners:
            owner = getattr(owner, each)
        delattr(owner, last)
        deleted += 1
    except (ImportError, AttributeError):
        pass  # a class may inherit the name
from sft_lightning.__main__ import main
for command in (["preview", "--list_templates"], ["fit", "--help"]):
    try:
        status = main(command)
    except SystemExit as end:
        status = end.code
    print("deleted", deleted, "status", status or 0)
"""


@pytest.mark.slow
def test_help_and_the_list_of_templates_come_without_any_of_the_names() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    reports = [line for line in result.stdout.splitlines() if line.startswith("deleted ")]
    assert [line.split("status ")[1] for line in reports] == ["0", "0"], result.stderr[-2000:]
    assert all(int(line.split()[1]) > 20 for line in reports)
    assert "vicuna_v1.1" in result.stdout
    assert "--trainer.max_steps" in result.stdout
