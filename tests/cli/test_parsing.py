from __future__ import annotations

import pytest

from sft_lightning.cli.parsing import clear_message


@pytest.mark.parametrize(
    ("raw", "clear"),
    [
        (
            "Subcommand 'fit' does not accept option 'data.lenght'",
            "data.lenght: no such key. Did you mean 'data.length'?",
        ),
        ("unrecognized arguments: --data.lenght 3", "data.lenght: no such key. Did you mean 'data.length'?"),
        ("unrecognized arguments: --zzz", "zzz: no such key."),
        ("Parser key \"a\":\n  Expected a <class 'int'>. Got value: x", "a: must be of type int (got 'x')"),
    ],
)
def test_parser_messages_are_shortened_to_key_value_and_way_out(raw: str, clear: str) -> None:
    assert clear_message(raw, ["data.length", "data.sources"]) == clear
