from __future__ import annotations

import os
from pathlib import Path

import pytest

from sft_lightning.__main__ import main
from sft_lightning.cli.saved_config import write_config


def test_an_equal_configuration_is_not_written_again(tmp_path: Path) -> None:
    file = tmp_path / "run" / "config.yaml"
    write_config(file, "a: 1\n")
    before = file.stat()
    write_config(file, "a: 1\n")
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [each.name for each in file.parent.iterdir()] == ["config.yaml"]


def test_earlier_configurations_are_kept_with_a_number(tmp_path: Path) -> None:
    for number in range(3):
        write_config(tmp_path / "config.yaml", f"a: {number}\n")
    found = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert found == {"config.1.yaml": "a: 0\n", "config.2.yaml": "a: 1\n", "config.yaml": "a: 2\n"}


def test_a_process_that_is_killed_while_writing_leaves_the_configuration_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path / "config.yaml", "a: 1\n")

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_config(tmp_path / "config.yaml", "a: 2\n")
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"


def test_a_continued_run_keeps_the_configuration_that_it_was_started_with(fit_args: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["fit", *fit_args, "--trainer.max_steps=1"]) == 0
    first = (run / "config.yaml").read_text()
    assert main(["fit", *fit_args, "--trainer.max_steps=2", "--ckpt_path=last"]) == 0
    assert (run / "config.1.yaml").read_text() == first
    assert "max_steps: 2" in (run / "config.yaml").read_text()
