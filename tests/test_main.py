from __future__ import annotations

import subprocess
import sys

import pytest

from sft_lightning import __version__
from sft_lightning.__main__ import find_commands, main


def without_torch(*args: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a process that reports whether torch was imported."""
    code = (
        "import sys; from sft_lightning.__main__ import main; status = main(sys.argv[1:]); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(status)"
    )
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("args", "status"), [(["--help"], 0), (["--version"], 0), (["fti"], 2), ([], 0)])
def test_the_top_level_answers_without_importing_torch(args: list[str], status: int) -> None:
    result = without_torch(*args)
    assert result.returncode == status
    assert result.stderr.strip().endswith("False")


def test_help_lists_every_command_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, line in find_commands().items():
        assert line
        assert f"{name} " in shown
        assert line in shown


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sft_lightning {__version__}\n"


def test_a_misspelt_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fti"]) == 2
    assert "Did you mean 'fit'?" in capsys.readouterr().err


def test_the_module_runs_as_a_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sft_lightning", "--version"], capture_output=True, text=True, check=True
    )
    assert __version__ in result.stdout
