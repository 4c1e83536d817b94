"""Covers sft_lightning.__main__, sft_lightning.cli.configuration and sft_lightning.cli.app: what a command imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LIBRARIES = {
    "bitsandbytes", "datasets", "deepspeed", "lightning", "numpy", "peft", "torch", "torchmetrics", "transformers",
    "transformers.modeling_utils",
}  # fmt: skip
NOT_FOR_CONFIGURATIONS = {"bitsandbytes", "deepspeed", "peft"}


def imported(*args: str) -> set[str]:
    """Run a command in a new process, and return which of the large libraries it imported."""
    code = (
        "import sys; from sft_lightning.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    return LIBRARIES & set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("command", ["chat", "migrate", "plan", "prepare", "preview", "selftest"])
def test_help_imports_no_large_library(command: str) -> None:
    assert imported(command, "--help") == set()


def test_templates_are_listed_without_a_large_library() -> None:
    assert imported("preview", "--list_templates") == set()


def test_the_help_of_all_keys_imports_lightning_but_no_model_code() -> None:
    assert not imported("fit", "--help") & (NOT_FOR_CONFIGURATIONS | {"datasets", "transformers.modeling_utils"})


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prepare", "preview"])
def test_commands_that_only_read_data_import_no_model_code(command: str, model_dir: Path, alpaca_file: Path) -> None:
    options = (
        *(f"--model.model_name_or_path={model_dir}", f"--data.sources={{toy: {{path: {alpaca_file}}}}}"),
        *("--data.template=alpaca", "--data.max_length=256", "--trainer.strategy=fsdp2"),
    )
    assert not imported(command, *options) & (NOT_FOR_CONFIGURATIONS | {"datasets"})
