from __future__ import annotations

from pathlib import Path

import pytest

from sft_lightning.data.formats.registry import Malformed, find_format, to_messages
from sft_lightning.errors import UserError
from sft_lightning.types import Message, Record

MODULE = """
from sft_lightning.data.formats.registry import Malformed
from sft_lightning.types import Message

def faq(record):
    if record.fields.get("a") is None:
        raise Malformed(f"{record.location}: not answered yet", "no_answer")
    return [Message("user", record.fields["q"]), Message("assistant", record.fields["a"])]

def backwards(record):
    return [Message("assistant", "a")]

def strings(record):
    return ["q", "a"]

def nothing(record):
    pass

NUMBER = 1
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "our_formats.py").write_text(MODULE)
    (tmp_path / "our_needs.py").write_text("import surely_not_installed_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def record(**fields: str) -> Record:
    return Record(fields, "faq", "f.json, record 0")


def test_a_dotted_path_names_a_format() -> None:
    assert find_format("our_formats.faq", record()) == "our_formats.faq"
    assert to_messages(record(q="?", a="!"), "our_formats.faq") == [Message("user", "?"), Message("assistant", "!")]


def test_its_messages_are_checked_like_those_of_any_format() -> None:
    with pytest.raises(Malformed, match="no user message"):
        to_messages(record(), "our_formats.backwards")


def test_it_may_raise_malformed() -> None:
    with pytest.raises(Malformed) as error:
        to_messages(record(q="?"), "our_formats.faq")
    assert error.value.reason == "no_answer"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("our_format.faq", "there is no module 'our_format'"),
        ("our_formats.deeper.faq", "there is no module 'our_formats.deeper'"),
        ("our_formats.fag", "the module our_formats has no function 'fag'"),
        ("our_formats.NUMBER", "our_formats.NUMBER must be a function of a Record (got int)"),
        ("our_needs.faq", "our_needs imports 'surely_not_installed_anywhere', which is not installed"),
        ("alpaca.json/x", "Known: alpaca"),
        (".faq", "Known: alpaca"),
    ],
)
def test_a_path_without_a_function_is_refused_with_the_key(name: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        find_format(name, record())
    assert "data.sources.faq.format" in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("strings", "must return a list of sft_lightning.types.Message (got a list with a str)"),
        ("nothing", "must return a list of sft_lightning.types.Message (got NoneType)"),
        ("faq", "raised KeyError: 'q'"),
    ],
)
def test_a_function_that_fails_stops_the_run_with_the_records_location(name: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        to_messages(record(a="!"), f"our_formats.{name}")
    assert f"f.json, record 0: our_formats.{name} {said}" in str(error.value)
    assert not isinstance(error.value, Malformed)
