"""Covers sft_lightning.__main__, sft_lightning.cli.configuration and sft_lightning.cli.app: what a command imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LIBRARIES = {
    "bitsandbytes", "datasets", "deepspeed", "lightning", "numpy", "peft", "pyarrow", "torch", "torchmetrics",
    "transformers", "transformers.modeling_utils",
}  # fmt: skip
NOT_FOR_CONFIGURATIONS = {"bitsandbytes", "deepspeed", "peft"}
NOT_FOR_FILES = {"datasets", "pyarrow"}  # needed for Hub data sets, Parquet and Arrow files


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


@pytest.mark.slow
def test_the_help_of_all_keys_imports_lightning_but_no_model_code() -> None:
    assert not imported("fit", "--help") & (NOT_FOR_CONFIGURATIONS | NOT_FOR_FILES | {"transformers.modeling_utils"})


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prepare", "preview"])
def test_commands_that_only_read_data_import_no_model_code(command: str, model_dir: Path, alpaca_file: Path) -> None:
    options = (
        *(f"--model.model_name_or_path={model_dir}", f"--data.sources={{toy: {{path: {alpaca_file}}}}}"),
        *("--data.template=alpaca", "--data.max_length=256", "--trainer.strategy=fsdp2"),
    )
    assert not imported(command, *options) & (NOT_FOR_CONFIGURATIONS | NOT_FOR_FILES)


WITHOUT_DATA_LIBRARIES = (
    "import sys; sys.modules |= dict.fromkeys(['datasets', 'pyarrow', 'deepspeed', 'tensorboard'])\n"
    "from sft_lightning.__main__ import main; main(sys.argv[1:])"
)


@pytest.mark.slow
def test_fit_on_a_json_file_needs_neither_datasets_nor_pyarrow(fit_args: list[str], tmp_path: Path) -> None:
    options = ["fit", *fit_args, "--trainer.accelerator=cpu", "--trainer.max_steps=1", "--trainer.logger=false"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DATA_LIBRARIES, *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
