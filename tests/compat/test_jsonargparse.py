"""Errors that jsonargparse itself raises here, not texts that are copied: new wording fails these tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from sft_lightning.compat import jsonargparse as compat


@dataclass
class Inner:
    """Values of the types that our keys have."""

    count: int = 1
    kind: Literal["red", "blue"] = "red"
    ratio: float | None = None
    every: bool | int | Literal["auto"] = "auto"
    names: list[str] | None = None


@dataclass
class Outer:
    """A configuration inside another."""

    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None


class Needy:
    """A class that needs a package."""

    def __init__(self, outer: Any = None) -> None:
        self.outer = outer


def parser() -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_class_arguments(Outer, "outer")
    return made


def error_of(*args: str) -> str:
    with pytest.raises(ArgumentError) as error:
        parser().parse_args(list(args))
    return str(error.value)


def test_the_key_of_a_rejected_value_and_the_reason_are_found() -> None:
    message = error_of("--outer.inner.count=many")
    assert compat.rejected_key(message) == "outer.inner.count"
    assert compat.short_reason(message) == "outer.inner.count: must be of type int (got 'many')"


def test_the_choices_of_a_key_are_named() -> None:
    reason = compat.short_reason(error_of("--outer.inner.kind=green"))
    assert reason == "outer.inner.kind: must be one of 'red', 'blue' (got 'green')"


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--outer.inner.ratio=much", "outer.inner.ratio: must be of type float (got 'much')"),
        ("--outer.inner.every=much", "outer.inner.every: must be of type bool or int or 'auto' (got 'much')"),
        ("--outer.inner.names=3", "outer.inner.names: must be of type list (got '3')"),
    ],
)
def test_a_value_that_fits_none_of_several_types_is_told_them(option: str, reason: str) -> None:
    assert compat.short_reason(error_of(option)) == reason


def test_a_reason_that_says_more_than_a_type_wins() -> None:
    reason = compat.short_reason(error_of("--outer.maybe={count: many}"))
    assert reason.startswith("outer.maybe: ")
    assert reason.endswith("count: must be of type int (got 'many')")


def test_an_unknown_option_is_found() -> None:
    assert compat.unknown_key(error_of("--outer.inner.cuont=2")) == "outer.inner.cuont"
    assert compat.unknown_key(error_of("--outer.inner.count=many")) is None


def test_an_unknown_option_of_a_subcommand_is_found() -> None:
    made = ArgumentParser(exit_on_error=False)
    made.add_subcommands().add_subcommand("fit", parser())
    with pytest.raises(ArgumentError) as error:
        made.parse_args(["fit", "--outer.cuont=2"])
    assert compat.unknown_key(str(error.value)) == "outer.cuont"


def test_an_unknown_key_in_a_nested_value_is_found() -> None:
    assert compat.unknown_key(error_of("--outer.maybe={cuont: 2}")) == "cuont"


def test_a_package_that_a_class_needs_is_found() -> None:
    message = "class_path 'a.b.C':\n  Requirement 'deepspeed>=0.18' not met"
    assert compat.missing_package(message) == compat.MissingPackage("a.b.C", "deepspeed>=0.18", "deepspeed")
    assert compat.missing_package(error_of("--outer.inner.count=many")) is None


def test_another_message_is_only_put_in_one_line() -> None:
    assert compat.rejected_key("all is\n  lost") is None
    assert compat.short_reason("all is\n  lost") == "all is lost"


def test_what_the_user_wrote_is_told_from_code_that_failed() -> None:
    with pytest.raises(ArgumentError) as error:
        parser().parse_args(["--outer.inner.count=many"])
    assert compat.is_about_a_value(error.value)
    assert not compat.is_about_a_value(ValueError("division by zero"))


def test_every_key_is_known_those_of_subcommands_and_of_what_is_null_too() -> None:
    made = ArgumentParser(exit_on_error=False)
    made.add_subcommands().add_subcommand("fit", parser())
    keys = set(compat.known_keys(made) or ())
    assert {"outer.inner.count", "outer.inner.kind", "outer.maybe", "outer.maybe.ratio"} <= keys


def test_an_option_without_its_value_is_found() -> None:
    assert compat.option_without_value(error_of("--outer.inner.count")) == "--outer.inner.count"
    assert compat.option_without_value(error_of("--outer.inner.count=many")) is None


def test_required_keys_and_words_that_are_no_option_are_found() -> None:
    made = parser()
    made.add_argument("--name", required=True)
    made.add_argument("--folder", required=True)
    with pytest.raises(ArgumentError) as error:
        made.parse_args([])
    assert compat.required_keys(str(error.value)) == ["name", "folder"]
    assert compat.stray_words(error_of("mine.yaml")) == "mine.yaml"
    assert compat.required_keys(error_of("mine.yaml")) == []


def test_that_a_value_is_no_file_is_not_the_reason() -> None:
    made = ArgumentParser(exit_on_error=False)
    made.add_class_arguments(Outer, "outer", sub_configs=True)
    with pytest.raises(ArgumentError) as error:
        made.parse_args(["--outer.maybe=nothing"])
    # jsonargparse 4.49 does not say it; later releases do.
    assert "Expected a path" not in compat.short_reason(str(error.value))
