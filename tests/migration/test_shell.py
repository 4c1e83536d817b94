from __future__ import annotations

import pytest

from sft_lightning.errors import UserError
from sft_lightning.migration.shell import command_words, split_launcher, training_words


def words(script: str) -> list[str]:
    return training_words(script, "train.sh")


def test_variables_are_expanded_and_continued_lines_joined() -> None:
    script = 'A=one\nB="${A} two"\nexport C=${D:-three}\npython t.py --a $A \\\n  --b "$B" --c ${C} # a note\n'
    assert words(script) == ["python", "t.py", "--a", "one", "--b", "one two", "--c", "three"]


def test_an_unquoted_variable_is_split_and_a_quoted_one_is_not() -> None:
    script = "M='q_proj v_proj'\npython t.py --m $M --n \"$M\" --o '$M'\n"
    assert words(script)[3:] == ["q_proj", "v_proj", "--n", "q_proj v_proj", "--o", "$M"]


def test_an_empty_argument_gets_its_default_and_a_set_one_keeps_its_value() -> None:
    script = """\
A=$1
B=set
if [ "$A" == "" ]; then
    A=default
fi
if [ -z "$B" ]; then
    B=other
fi
python t.py --a $A --b $B
"""
    assert words(script)[2:] == ["--a", "default", "--b", "set"]


def test_only_a_redirection_ends_the_command() -> None:
    assert words("mkdir -p x\npython t.py --a 1 &> log --b 2\necho done.py") == ["python", "t.py", "--a", "1"]
    assert words("M=<your model>\npython t.py --a $M --b 2")[2:] == ["--a", "<your model>", "--b", "2"]


def test_an_unset_variable_is_kept_as_written() -> None:
    assert words("python t.py --seed $RANDOM --a ${NEVER}")[2:] == ["--seed", "$RANDOM", "--a", "${NEVER}"]


def test_a_script_without_a_command_and_an_open_quote_are_user_errors() -> None:
    with pytest.raises(UserError, match=r"train\.sh: no command runs"):
        words("echo hello\n")
    with pytest.raises(UserError, match="a quote is not closed"):
        command_words('python t.py --a "open', "the command")


def test_the_launcher_is_split_from_the_program() -> None:
    assert split_launcher(["torchrun", "--nnodes", "2", "a/run.py", "--x"]) == (
        ["torchrun", "--nnodes", "2"],
        "a/run.py",
        ["--x"],
    )
    assert split_launcher(["--x", "1"]) == ([], "", ["--x", "1"])


def test_the_branch_of_an_if_that_the_arguments_choose_is_followed() -> None:
    script = """\
if [ "$1" == true ]; then
    A="--offload"
elif [ $1 != "" ]; then
    A="--other"
else
    A=""
fi
if [[ -n "$2" ]]; then
    B="--b $2"
fi
python t.py $A $B
"""
    assert training_words(script, "train.sh", ["true", "7"]) == ["python", "t.py", "--offload", "--b", "7"]
    assert training_words(script, "train.sh", ["x"]) == ["python", "t.py", "--other"]
    assert training_words(script + "python u.py --x", "train.sh") == ["python", "u.py", "--x"]


def test_a_command_in_a_variable_is_read() -> None:
    script = 'Z=$1\ncmd="deepspeed main.py \\\n  --zero_stage $Z --deepspeed"\necho $cmd\n$cmd &> log\n'
    assert training_words(script, "train.sh", ["3"]) == ["deepspeed", "main.py", "--zero_stage", "3", "--deepspeed"]
