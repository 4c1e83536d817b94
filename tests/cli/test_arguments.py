from __future__ import annotations

from pathlib import Path

import pytest

from sft_lightning.cli.arguments import GivenArguments, asks_for_help
from sft_lightning.errors import UserError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "a.yaml"
    file.write_text("task: dpo\nmodel: {optimizer: {class_path: bitsandbytes.optim.Lion}}\n")
    return file


def test_the_last_value_wins(config: Path) -> None:
    assert GivenArguments(["--task", "sft", f"--config={config}"]).value_of("task") == "dpo"
    assert GivenArguments(["-c", str(config), "--task=sft"]).value_of("task") == "sft"


def test_a_file_without_the_key_changes_nothing(config: Path, tmp_path: Path) -> None:
    for name, content in {"b.yaml": "data: {max_length: 3}\n", "empty.yaml": ""}.items():
        (tmp_path / name).write_text(content)
        assert GivenArguments(["--config", str(config), "--config", str(tmp_path / name)]).value_of("task") == "dpo"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"task: sft\ndata: [\n", "broken.yaml', line 3"),
        (b"\xff", "not text in UTF-8"),
        (b"- a list", r"must map keys to values \(got a list\)"),
    ],
)
def test_a_broken_config_file_is_named(content: bytes, said: str, config: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_bytes(content)
    with pytest.raises(UserError, match=f"--config: .*{said}"):
        GivenArguments([f"--config={config}", f"--config={tmp_path / 'broken.yaml'}"])


def test_a_config_file_must_exist_and_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--config: 'nowhere.yaml' does not exist \(looked in "):
        GivenArguments(["--config", "nowhere.yaml"])
    with pytest.raises(UserError, match=r"--config: .* cannot be read: Is a directory"):
        GivenArguments(["--config", str(tmp_path)])


@pytest.mark.parametrize("value", ["s3://bucket/a.yaml", "{task: dpo}", "task: dpo\ndata: {}"])
def test_what_is_no_local_file_is_left_to_the_parser(value: str) -> None:
    assert GivenArguments(["--config", value]).value_of("task") is None


def test_a_config_option_without_a_value_is_left_to_the_parser() -> None:
    assert GivenArguments(["--config"]).value_of("task") is None


def test_another_optimizer_is_recognized_in_files_and_options(config: Path) -> None:
    def names_another(*args: str) -> bool:
        return GivenArguments(args).names_another_optimizer()

    assert names_another(f"--config={config}")
    assert names_another("--model.optimizer=torch.optim.SGD")
    assert names_another("--model.optimizer.class_path", "torch.optim.SGD")
    assert not names_another("--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-4")


def test_callbacks_and_strategies_that_are_classes_are_recognized(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("trainer: {strategy: {class_path: FSDP2}}\n")
    assert GivenArguments([f"--config={file}"]).names_classes()
    assert GivenArguments(["--trainer.callbacks+=Throughput"]).names_classes()
    assert not GivenArguments(["--trainer.strategy=fsdp2", "--trainer.max_steps=3"]).names_classes()


@pytest.mark.parametrize("option", ["-h", "--help", "--help=lr"])
def test_help_is_recognized(option: str) -> None:
    assert asks_for_help(["--data.max_length=3", option])
    assert GivenArguments([option]).shows_help()
    assert not asks_for_help(["--data.max_length=3", "--html=x"])


def test_a_printed_configuration_with_comments_shows_help_too() -> None:
    assert GivenArguments(["--print_config=comments"]).shows_help()
    assert not GivenArguments(["--print_config"]).shows_help()


def test_a_key_that_is_set_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model:\n  dtype: float32\n  adapter: {r: 8}\n  dtype: bfloat16\n")
    with pytest.raises(UserError, match=r"a\.yaml', line 4: the key 'dtype' is set twice; remove one"):
        GivenArguments(["--config", str(file)])


def test_a_merge_key_may_be_overridden(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: &a {weight: 1}\nb: {<<: *a, weight: 2}\nc: {<<: *a}\n")
    assert GivenArguments(["--config", str(file)]).value_of("b.weight") == 2
