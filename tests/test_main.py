from __future__ import annotations

import os
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
    commands = find_commands()
    assert {"fit", "validate", "test", "predict", "prepare", "preview", "plan", "compare", "chat", "merge", "selftest",
            "migrate"} == set(commands)  # fmt: skip
    for name, command in commands.items():
        assert f"  {name} " in shown
        assert command.help
        assert command.help in shown


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


@pytest.mark.parametrize(
    ("variables", "status"),
    [
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, 2),
        ({"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}, 0),  # rank 0 reports it
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, 2),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, 0),
    ],
)
def test_a_launcher_is_refused_by_commands_that_run_in_one_process(
    variables: dict[str, str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["merge", "--no-such-option"]) == status
    said = capsys.readouterr().err
    if status:
        assert "merge: runs in one process, but a launcher started 2 processes" in said
        assert "run it without the launcher: python -m sft_lightning merge" in said
    else:
        assert not said


@pytest.mark.parametrize(
    "variables",
    [{"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "8", "RANK": "3"}, {"SLURM_NTASKS": "16"}],
)
def test_cluster_variables_without_a_launcher_are_ignored(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["migrate", "--help"]) == 0
    assert "usage" in capsys.readouterr().out


def test_several_processes_may_prepare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["prepare", "--data.max_lenght=3"]) == 2
    assert "max_length" in capsys.readouterr().err


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_of_gpu_memory_are_expandable_unless_the_user_set_something(
    name: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(each, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "max_split_size_mb:64")
    assert main(["migrate", "--table"]) == 0
    found = {key: value for key, value in os.environ.items() if key.endswith("ALLOC_CONF")}
    assert found == (
        {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if name is None else {name: "max_split_size_mb:64"}
    )
