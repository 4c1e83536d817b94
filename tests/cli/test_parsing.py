from __future__ import annotations

import re

import pytest

from sft_lightning.cli.parsing import clear_message, command_parser
from sft_lightning.errors import UserError
from sft_lightning.models.generation.config import LoadOptions


@pytest.mark.parametrize(
    ("raw", "clear"),
    [
        (
            "Subcommand 'fit' does not accept option 'data.lenght'",
            "data.lenght: no such key. Did you mean 'data.length'?",
        ),
        ("unrecognized arguments: --data.lenght 3", "data.lenght: no such key. Did you mean 'data.length'?"),
        ("unrecognized arguments: --zzz", "zzz: no such key."),
        (
            "unrecognized arguments: mine.yaml",
            "mine.yaml: not an option; options start with --, and a configuration file follows --config",
        ),
        ("argument -c/--config: expected one argument", "--config: requires a value"),
        (
            "the following arguments are required: adapter, output_dir",
            "--adapter, --output_dir: required; --help describes the options",
        ),
        ("Parser key \"a\":\n  Expected a <class 'int'>. Got value: x", "a: must be of type int (got 'x')"),
    ],
)
def test_messages_of_jsonargparse_become_one_line(raw: str, clear: str) -> None:
    assert clear_message(raw, ["data.length", "data.sources"]) == clear


def test_a_command_parser_raises_one_line_and_names_the_nearest_option() -> None:
    parser = command_parser("chat", "Chat.", [])
    parser.add_argument("--model", type=str, required=True)
    for args, said in {("--modle=x",): "Did you mean 'model'?", (): "--model: required"}.items():
        with pytest.raises(UserError, match=re.escape(said)):
            parser.parse_args([*args])


def test_help_has_the_docstrings_of_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    parser = command_parser("compare", "Compare.", ["--help"])
    parser.add_class_arguments(LoadOptions, None)
    parser.print_help()
    assert "Run code that comes with the model." in capsys.readouterr().out
