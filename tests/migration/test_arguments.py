from __future__ import annotations

import json
from pathlib import Path

import pytest

from sft_lightning.errors import UserError
from sft_lightning.migration.arguments import is_true, read_options


def test_the_words_of_a_command_are_options_launcher_and_program() -> None:
    given = read_options(["torchrun", "--nproc_per_node=2", "train.py", "--lora-r", "8", "--bf16", "--names", "a", "b"])
    assert given.options == {"lora_r": ["8"], "bf16": [], "names": ["a", "b"]}
    assert given.launcher == {"nproc_per_node": ["2"]}
    assert given.program == "train.py"


def test_a_command_may_be_one_word() -> None:
    assert read_options(["python train.py --lr 1e-4"]).options == {"lr": ["1e-4"]}
    assert read_options(["--lr=1e-4"]).options == {"lr": ["1e-4"]}


def test_a_script_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "train.sh").write_text("LR=1e-4\npython train.py --lr $LR\n")
    assert read_options([str(tmp_path / "train.sh")]).options == {"lr": ["1e-4"]}


def test_a_json_file_has_lists_objects_and_no_nulls(tmp_path: Path) -> None:
    values = {"lr": 1e-4, "names": ["a", "b"], "config": {"a": 1}, "unset": None, "bf16": True}
    (tmp_path / "args.json").write_text(json.dumps(values))
    assert read_options([str(tmp_path / "args.json")]).options == {
        "lr": ["0.0001"], "names": ["a", "b"], "config": ['{"a": 1}'], "bf16": ["True"],
    }  # fmt: skip


def test_the_argument_file_of_a_script_is_found_beside_it(tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text('{"lr": 0.1}')
    (tmp_path / "train.sh").write_text("deepspeed --num_gpus 4 train.py --train_args_file args.json\n")
    given = read_options([str(tmp_path / "train.sh")])
    assert (given.options, given.launcher) == ({"lr": ["0.1"]}, {"num_gpus": ["4"]})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give a shell script"),
        (["gone.sh"], "'gone.sh' does not exist"),
        (["train.py", "--train_args_file", "gone.json"], r"reads its options from 'gone\.json'"),
    ],
)
def test_input_that_does_not_exist_is_a_user_error(args: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_options(args)


@pytest.mark.parametrize(("text", "message"), [("[1]", r"must be a JSON object .*got list"), ("{", "line 1.*invalid")])
def test_a_json_file_that_holds_no_options_is_a_user_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_options([str(tmp_path / "args.json")])


@pytest.mark.parametrize(("values", "on"), [([], True), (["True"], True), (["no"], False), (["FALSE"], False)])
def test_a_flag_is_on_without_a_value_or_with_one_that_is_not_false(values: list[str], on: bool) -> None:
    assert is_true(values) is on
