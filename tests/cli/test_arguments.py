from __future__ import annotations

from pathlib import Path

import pytest

from sft_lightning.cli.arguments import names_another_optimizer, shows_help, value_of


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "a.yaml"
    file.write_text("task: dpo\nmodel: {optimizer: {class_path: bitsandbytes.optim.Lion}}\n")
    return file


def test_the_last_value_wins(config: Path) -> None:
    assert value_of(["--task", "sft", f"--config={config}"], "task") == "dpo"
    assert value_of(["-c", str(config), "--task=sft"], "task") == "sft"


def test_a_file_without_the_key_changes_nothing(config: Path, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("data: {max_length: 3}\n")
    assert value_of(["--config", str(config), "--config", str(tmp_path / "b.yaml")], "task") == "dpo"


@pytest.mark.parametrize("content", [b"task: [", b"\xff", b"", b"- a list"])
def test_a_broken_file_is_left_to_the_parser(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_bytes(content)
    assert value_of([f"--config={tmp_path / 'broken.yaml'}", "--config=missing.yaml", "--config"], "task") is None


def test_another_optimizer_is_recognized_in_files_and_options(config: Path) -> None:
    assert names_another_optimizer([f"--config={config}"])
    assert names_another_optimizer(["--model.optimizer=torch.optim.SGD"])
    assert names_another_optimizer(["--model.optimizer.class_path", "torch.optim.SGD"])
    assert not names_another_optimizer(["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-4"])


@pytest.mark.parametrize("option", ["-h", "--help", "--help=lr", "--print_config=comments"])
def test_help_is_recognized(option: str) -> None:
    assert shows_help(["--config=a.yaml", option])
    assert not shows_help(["--config=a.yaml", "--print_config", "--html=x"])
