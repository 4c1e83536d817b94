from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from sft_lightning.__main__ import main
from sft_lightning.cli.commands.migrate import SYSTEMS
from sft_lightning.data.pairs.spec import PairDataSpec
from sft_lightning.migration.training_arguments import TRAINING_ARGUMENTS
from sft_lightning.training.spec import PreferenceSpec

DOCUMENT = Path(__file__).parents[3] / "docs" / "migrating.md"


def test_docs_migrating_is_the_output_of_the_table_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", "--table"]) == 0
    assert capsys.readouterr().out == DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize("system", SYSTEMS)
def test_options_are_listed_once_and_omitted_ones_have_a_reason(system: str) -> None:
    options = SYSTEMS[system].options
    names = [option.name for option in options]
    assert len(names) == len(set(names))
    assert all(option.note for option in options if option.how == "omitted")
    assert all(option.key for option in options if option.how == "copied")


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_key_of_the_model_and_the_data_exists(system: str) -> None:
    known = {
        "model": {field.name for field in fields(PreferenceSpec)},
        "data": {field.name for field in fields(PairDataSpec)},
    }
    for option in SYSTEMS[system].options:
        for owner, name, *_ in (key.strip().split(".") for key in option.key.split(",") if "." in key):
            assert name in known.get(owner, {name}), option


def test_four_systems_take_all_training_arguments() -> None:
    names = {option.name for option in TRAINING_ARGUMENTS}
    assert [name for name, system in SYSTEMS.items() if names <= {option.name for option in system.options}] == [
        "fastchat",
        "vigogne",
        "firefly",
        "chinese_alpaca",
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fastcat"], "Did you mean 'fastchat'?"),
        (["fastchat"], "give a shell script"),
        (["fastchat", "gone.sh"], "'gone.sh' does not exist"),
        (["fastchat", "train_lora.py", "--lora_r", "eight"], "--lora_r: 'eight' is not a number"),
        (["fastchat", "train_lora.py", "nothing"], "found no options"),
    ],
)
def test_input_that_cannot_be_read_is_a_user_error(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["migrate", *args]) == 2
    assert message in capsys.readouterr().err


def test_invalid_json_is_reported_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text('{"lora_rank": 8,\n "x"}')
    assert main(["migrate", "firefly", str(tmp_path / "a.json")]) == 2
    assert "a.json, line 2" in capsys.readouterr().err


def test_help_names_the_systems(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", "--help"]) == 0
    assert "chinese_alpaca" in capsys.readouterr().out
