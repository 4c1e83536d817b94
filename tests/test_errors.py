from __future__ import annotations

import functools
from pathlib import Path

import pytest

from sft_lightning.errors import UserError, clear_load_errors, did_you_mean, one_of, shortened

loading = functools.partial(clear_load_errors, "--adapter", "adapter")


def test_a_misspelt_word_gets_the_nearest_valid_one() -> None:
    assert did_you_mean("alpacca", ["alpaca", "sharegpt"]) == " Did you mean 'alpaca'?"


def test_a_word_that_is_like_no_valid_one_gets_no_suggestion() -> None:
    assert did_you_mean("xyz", ["alpaca", "sharegpt"]) == ""


def test_an_unknown_value_is_answered_with_its_key_the_nearest_and_all_valid_values() -> None:
    error = one_of("data.packing", "best-fit", ["none", "best_fit"])
    assert str(error) == "data.packing: 'best-fit' is unknown. Did you mean 'best_fit'? Known: best_fit, none."


def test_a_long_text_is_cut_to_the_limit_with_an_ellipsis() -> None:
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "abcde…"


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_a_folder_that_does_not_exist_is_told_from_a_hub_id(name: str) -> None:
    with (
        pytest.raises(UserError, match=r"^--adapter: the folder '.*' does not exist \(looked in "),
        loading(name),
    ):
        pass


def test_a_folder_without_the_files_is_answered_with_what_it_holds(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").touch()
    with (
        pytest.raises(UserError, match=r"it has no config\.json \(it holds: 0\.txt, .*7\.txt, …\)"),
        loading(str(tmp_path), ["config.json"]),
    ):
        pass


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="it holds: nothing"),
        loading(str(tmp_path), ["config.json"]),
    ):
        pass


@pytest.mark.parametrize("error", [OSError("no such\nthing"), ValueError("no such"), TypeError("no such")])
def test_the_first_line_of_a_librarys_error_is_the_message(error: Exception) -> None:
    with pytest.raises(UserError) as caught, loading("owner/name"):
        raise error
    assert str(caught.value) == "--adapter: cannot load an adapter from 'owner/name': no such"
    assert caught.value.__cause__ is error


def test_an_error_without_a_text_is_named_by_its_type() -> None:
    with (
        pytest.raises(UserError, match="cannot load an adapter from 'owner/name': OSError"),
        loading("owner/name"),
    ):
        raise OSError


def test_other_errors_pass_unless_they_are_named() -> None:
    with pytest.raises(KeyError), loading("owner/name"):
        raise KeyError("a bug of ours")
    with (
        pytest.raises(UserError, match="cannot load an adapter"),
        loading("owner/name", also=(KeyError,)),
    ):
        raise KeyError("weight")


def test_a_user_error_passes_as_it_is() -> None:
    with pytest.raises(UserError, match=r"^as it is$"), loading("owner/name"):
        raise UserError("as it is")


def test_a_model_and_an_adapter_have_their_own_articles() -> None:
    with (
        pytest.raises(UserError, match="--model: cannot load a model from"),
        clear_load_errors("--model", "model", "x"),
    ):
        raise OSError
